"""Text to token ids and back: tokenizer.json through `tokenizers`, chats through the templates of modeling/templates.py.

Ids equal those of transformers 5, where tokenizer.json alone says what precedes a prompt (`add_bos_token` does not).
Three differences are deliberate: no EOS is appended to a prompt, a BOS that the text itself begins with is not doubled,
and decoding never "cleans up" spaces (that would change text already streamed).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from modeling.config import read_json
from modeling.errors import RestKVWarning, TokenizerError
from modeling.templates import DEFAULT, ChatTemplates, Source, find_templates, plain_variables
from modeling.text import fault

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's spelling of a single byte


class Tokenizer:
    """A folder's tokenizer. Make it with from_folder()."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        template: str | Mapping[str, Source] | None,
        place: str,
    ):
        """`settings`: tokenizer_config.json. `template`: the chat template, or several by name. `place`: named in errors."""
        self._tokenizer = tokenizer
        self._templates = ChatTemplates({DEFAULT: template} if isinstance(template, str) else template or {}, place)
        self._place = place
        # Some files ask for truncation or padding as their training did; a prompt must arrive whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._special_ids = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_tokens = {name: text for name in SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self._prefix = self._prompt_prefix()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and tokenizer_config.json and a chat template if any.

        Raises TokenizerError when tokenizer.json is absent or unreadable, or tokenizer_config.json is broken. A chat template
        that is broken is refused when it is asked for.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{folder}: no tokenizer.json; make it from the folder's other tokenizer files with "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: unreadable ({_one_line(error)}); copy or download the file again") from None
        config = folder / "tokenizer_config.json"
        settings = read_json(config, TokenizerError) if config.is_file() else {}
        return cls(tokenizer, settings, find_templates(folder, settings), str(folder))

    @property
    def vocab_size(self) -> int:
        """Ids are below this; added tokens count."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template, if only one that cannot be used (rendering says why)."""
        return bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The source of the template that is used when none is named."""
        return self._templates.default

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text. With `bos`, what the tokenizer puts before a prompt comes first, unless it is there.

        Spellings of special tokens in the text become those tokens.
        """
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise TokenizerError(f"a text {fault(text) or 'is none'}; mend or convert it first") from None
        if not bos or ids[: len(self._prefix)] == self._prefix:
            return ids
        return self._prefix + ids

    def ends(self, text: str) -> list[int]:
        """For every token of encode(text, bos=False), how many characters of the text it and those before it stand for."""
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that goes on after another: no BOS, and no space that a beginning would get.

        SentencePiece tokenizers put a space before every text; in the middle of one it would be a token too many.
        """
        ids = self.encode(text, bos=False)
        if not self._opens_with_space:
            return ids
        opening = self.encode("\n", bos=False)
        joined = self.encode("\n" + text, bos=False)
        return joined[len(opening) :] if joined[: len(opening)] == opening else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def spelling(self, token: int, skip_special: bool = True) -> str | None:
        """The vocabulary's entry for an id, None for one that decode() leaves out."""
        if skip_special and token in self._special_ids:
            return None
        return self._tokenizer.id_to_token(token)

    def stream(self, skip_special: bool = True) -> Stream:
        """A decoder that is given one id at a time."""
        return Stream(self, skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
        template_name: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation: render() it and encode the result; the template itself writes any BOS."""
        return self.encode(self.render(messages, add_generation_prompt, template_args, template_name), bos=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
        template_name: str | None = None,
        **variables: Any,
    ) -> str:
        """The chat template's text for messages, each with a "role" and usually a "content".

        It is made in a process of its own, under limits of time and memory (modeling/renderer.py).

        Args:
            template_args: variables of the template, such as {"enable_thinking": False}: what JSON can hold.
            template_name: which of several templates; None: "tool_use" where there are tools and such a template, else "default".
            variables: more of them, such as tools, by keyword.
        Raises:
            TokenizerError: there is no template, or it is broken, refuses the messages, or takes too long or too much; or a
                variable that no template can be given.
        """
        given = plain_variables(template_args or {})
        for name in given.keys() & variables.keys():
            raise TokenizerError(f"template variable {name!r}: given twice; drop one of them")
        given |= variables
        return self._templates.render(messages, self.special_tokens, add_generation_prompt, given, template_name)

    def check_template(self, template_args: Mapping[str, Any], template_name: str | None = None) -> None:
        """Warn of variables that the chat template never reads, such as misspelt ones; they change nothing.

        Raises:
            TokenizerError: there is no such template, it is broken, or a variable is none that it can be given.
        """
        for name in self._templates.unread(template_args, template_name):
            warnings.warn(
                f"the chat template reads no variable {name!r}, which changes nothing", RestKVWarning, stacklevel=3
            )

    @cached_property
    def _opens_with_space(self) -> bool:
        opening = self.encode("\n", bos=False)
        return self.encode("\na", bos=False)[len(opening) :] != self.encode("a", bos=False)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _prompt_prefix(self) -> list[int]:
        """The ids that the post-processor of tokenizer.json puts before every text (BOS, or nothing)."""
        probe = self._tokenizer.encode("a", add_special_tokens=True)
        count = next((i for i, added in enumerate(probe.special_tokens_mask) if not added), 0)
        return probe.ids[:count]


class Stream:
    """Token ids in, text out, as early as it is certain: the pieces joined are exactly decode() of all ids.

    A piece is held back while its text may still change, which is in two cases: it ends in the middle of a UTF-8
    character (it then decodes to U+FFFD at its end), or it ends in a run of SentencePiece byte tokens, which decode
    together or, if one of them does not fit, not at all.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Ids of the last piece given out, then those not given out yet. A decoder may treat the first of all tokens
        # in its own way (SentencePiece drops its space), so new ids are always decoded behind some old ones.
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain; "" if there is none yet."""
        spelling = self._tokenizer.spelling(token, self._skip_special)
        if spelling is None:
            return ""
        self._ids.append(token)
        if BYTE_TOKEN.fullmatch(spelling):
            return ""
        piece = self._pending()
        if piece.endswith("\ufffd"):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return piece

    def flush(self) -> str:
        """All text held back; the stream can go on after it as if new."""
        piece = self._pending()
        self._ids, self._given = [], 0
        return piece

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], self._skip_special)
        return self._tokenizer.decode(self._ids, self._skip_special)[len(before) :]


def _token_text(entry: Any) -> str | None:
    """A special token is spelled as a string or as an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

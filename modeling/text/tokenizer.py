"""Text to token ids and back: tokenizer.json through `tokenizers`, chats through the templates of modeling/text/templates.py.

Ids, special tokens and what decoding hides equal those of transformers 5's AutoTokenizer, whatever lies beside tokenizer.json
(modeling/text/special_tokens.py), which alone says what precedes a prompt (`add_bos_token` of tokenizer_config.json does not).
Four differences are deliberate: no EOS is appended to a prompt, a BOS that the text itself begins with is not doubled, decoding
never "cleans up" spaces (that would change text already streamed), and no merges are dropped at random (BPE dropout).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from modeling.errors import RestKVWarning, TokenizerError
from modeling.room import enough_memory, require
from modeling.text.characters import fault
from modeling.text.file import TokenizerFile, joins_bytes, read_tokenizer
from modeling.text.guard import guarded
from modeling.text.outlook import outlook
from modeling.text.special_tokens import SideFiles, complete, id_of
from modeling.text.stream import Stream
from modeling.text.templates import DEFAULT, ChatTemplates, Source, find_templates, plain_variables

LONG = 1 << 20  # characters; less is not worth a look at what is free
PER_CHARACTER = 64  # bytes that encoding takes at the least; measured: 100 to 220
# SentencePiece's spelling of a single byte; the library reads small letters and a sign as well.
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2}|[+][0-9A-Fa-f])>")

GOES_ON = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark of where a message is gone on with


class Tokenizer:
    """A folder's tokenizer. Make it with from_folder()."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | TokenizerFile,
        settings: Mapping[str, Any] | SideFiles,
        template: str | Mapping[str, Source] | None,
        place: str,
    ):
        """Completes `tokenizer` with the tokens that the files beside it name.

        Args:
            tokenizer: of a file, or one that was made here.
            settings: tokenizer_config.json, or all that lies beside tokenizer.json.
            template: the chat template, or several by name.
            place: named in errors.
        """
        file = tokenizer if isinstance(tokenizer, TokenizerFile) else TokenizerFile(tokenizer)
        side = settings if isinstance(settings, SideFiles) else SideFiles(settings)
        self._templates = ChatTemplates({DEFAULT: template} if isinstance(template, str) else template or {}, place)
        self._place = place
        with guarded(place, "completing the tokenizer"):
            done = complete(file, side, place)
            self._tokenizer = done.tokenizer
            self.special_tokens = done.names
            self._prefix = done.before
            self.bos_id, eos = (id_of(done.tokenizer, done.names, name) for name in ("bos_token", "eos_token"))
            self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
            self._added = frozenset(done.tokenizer.get_added_tokens_decoder())
            self._joins_bytes = joins_bytes(done.tokenizer)
            self.outlook = outlook(done.tokenizer)
        self._entries: dict[int, tuple[str | None, bool]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and what lies beside it, a chat template too, if any.

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
        file, side = read_tokenizer(path), SideFiles.of_folder(folder)
        return cls(file, side, find_templates(folder, side.settings), str(folder))

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this; added tokens count."""
        with guarded(self._place, "listing the vocabulary"):
            return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template, if only one that cannot be used (rendering says why)."""
        return bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The source of the template that is used when none is named."""
        return self._templates.default

    @cached_property
    def digest(self) -> str:
        """A name for exactly this tokenizer and chat template."""
        parts = (self._tokenizer.to_str(), self.chat_template, sorted(self.special_tokens.items()), self.encode(""))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text. With `bos`, what the tokenizer puts before a prompt comes first, unless it is there.

        Spellings of special tokens in the text become those tokens.

        >>> recall = Tokenizer.from_folder("restkv/assets/recall-mini")  # from the repository's root
        >>> recall.decode(recall.encode("Tom has a red kite."))
        'Tom has a red kite.'
        """
        ids: list[int] = self._encoded(text).ids
        if not bos or ids[: len(self._prefix)] == self._prefix:
            return ids
        return self._prefix + ids

    def ends(self, text: str) -> list[int]:
        """For every token of encode(text, bos=False), how many characters of the text it and those before it stand for."""
        return [end for _, end in self._encoded(text).offsets]

    def _encoded(self, text: str) -> tokenizers.Encoding:
        if isinstance(text, str) and len(text) > LONG:  # tokenizers would end the process
            with enough_memory(f"encode a text of {len(text):,} characters", "give a shorter one"):
                require(len(text) * PER_CHARACTER)
        with guarded(self._place, "encoding a text"):
            try:
                return self._tokenizer.encode(text, add_special_tokens=False)
            except (TypeError, UnicodeError):
                raise TokenizerError(f"a text {fault(text) or 'is none'}; mend or convert it first") from None

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
        with guarded(self._place, "decoding token ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def spelling(self, token: int, skip_special: bool = True) -> str | None:
        """The vocabulary's entry for an id, None for one that decode() leaves out."""
        text, hidden = self._entry(token)
        return None if hidden and skip_special else text

    def byte(self, token: int) -> int | None:
        """The byte that a SentencePiece byte token stands for, None for any other token."""
        text = self._entry(token)[0] if self._joins_bytes else None
        found = BYTE_TOKEN.fullmatch(text) if text else None
        return int(found[1], 16) if found else None

    def _entry(self, token: int) -> tuple[str | None, bool]:
        """The vocabulary's entry, and whether decode() leaves it out, which the library tells in no other way."""
        known = self._entries.get(token)
        if known is None:
            with guarded(self._place, "looking up a token id"):
                text = self._tokenizer.id_to_token(token)
            shown, all_shown = (self._alone(token, skip) if token in self._added else "" for skip in (True, False))
            known = self._entries[token] = text, shown != all_shown
        return known

    def _alone(self, token: int, skip_special: bool) -> str | None:
        """Its text without others; None where the library fails, as on a Strip of more than there is."""
        try:
            return self.decode([token], skip_special)
        except TokenizerError:
            return None

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

        It is made in a process of its own, under limits of time and memory (modeling/text/renderer.py).

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

    def render_open(self, messages: Sequence[Mapping[str, Any]], template_args: Mapping[str, Any] | None = None) -> str:
        """render() up to the end of the last message's content, which is to be gone on with.

        As with transformers' continue_final_message: spaces at its end stay, unless the template drops them.

        Raises:
            TokenizerError: as of render(); or the last message has no text, or the template does not show it as it is.
        """
        content = messages[-1].get("content") if messages else None
        if not isinstance(content, str):
            raise TokenizerError(f"{self._place}: the last chat message has no text to go on with; give it a 'content'")
        text = self.render([*messages[:-1], {**messages[-1], "content": content + GOES_ON}], False, template_args)
        at = text.rfind(GOES_ON.strip())
        if at < 0 or content.strip() not in text:
            raise TokenizerError(
                f"{self._place}: the chat template does not show the last message as it is; end with a question"
            )
        return text[:at] if text.startswith(GOES_ON, at) else text[:at].rstrip()

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

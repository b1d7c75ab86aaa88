"""Text to token ids and back: tokenizer.json through `tokenizers`, chat templates through sandboxed jinja2.

Ids, special tokens and what decoding hides equal those of transformers 5's AutoTokenizer, whatever lies beside tokenizer.json
(modeling/special_tokens.py), which alone says what precedes a prompt (`add_bos_token` of tokenizer_config.json does not).
Four differences are deliberate: no EOS is appended to a prompt, a BOS that the text itself begins with is not doubled, decoding
never "cleans up" spaces (that would change text already streamed), and no merges are dropped at random (BPE dropout).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from modeling.config import read_json
from modeling.errors import TokenizerError
from modeling.files import read_text
from modeling.special_tokens import SideFiles, complete, id_of
from modeling.stream import Stream
from modeling.tokenizer_file import TokenizerFile, joins_bytes, read_tokenizer
from modeling.tokenizer_guard import guarded

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's spelling of a single byte


class Tokenizer:
    """A folder's tokenizer. Make it with from_folder()."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | TokenizerFile,
        settings: Mapping[str, Any] | SideFiles,
        template: str | None,
        place: str,
    ):
        """Completes `tokenizer` with the tokens that the files beside it name.

        Args:
            tokenizer: of a file, or one that was made here.
            settings: tokenizer_config.json, or all that lies beside tokenizer.json.
            template: the chat template's source.
            place: named in errors.
        """
        file = tokenizer if isinstance(tokenizer, TokenizerFile) else TokenizerFile(tokenizer)
        side = settings if isinstance(settings, SideFiles) else SideFiles(settings)
        self._template = template
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
        self._entries: dict[int, tuple[str | None, bool]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and what lies beside it, a chat template too, if any.

        Raises TokenizerError when tokenizer.json is absent or unreadable, or another file is broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{folder}: no tokenizer.json; make it from the folder's other tokenizer files with "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        file, side = read_tokenizer(path), SideFiles.of_folder(folder)
        return cls(file, side, _template_source(folder, side.settings), str(folder))

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below this; added tokens count."""
        with guarded(self._place, "listing the vocabulary"):
            return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        return self._template

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text. With `bos`, what the tokenizer puts before a prompt comes first, unless it is there.

        Spellings of special tokens in the text become those tokens.
        """
        ids: list[int] = self._encoded(text).ids
        if not bos or ids[: len(self._prefix)] == self._prefix:
            return ids
        return self._prefix + ids

    def ends(self, text: str) -> list[int]:
        """For every token of encode(text, bos=False), how many characters of the text it and those before it stand for."""
        return [end for _, end in self._encoded(text).offsets]

    def _encoded(self, text: str) -> tokenizers.Encoding:
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
                shown, all_shown = (
                    self._tokenizer.decode([token], skip_special_tokens=skip) if token in self._added else ""
                    for skip in (True, False)
                )
            known = self._entries[token] = text, shown != all_shown
        return known

    def stream(self, skip_special: bool = True) -> Stream:
        """A decoder that is given one id at a time."""
        return Stream(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: render() it and encode the result; the template itself writes any BOS."""
        return self.encode(self.render(messages, add_generation_prompt), bos=False)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat template's text for messages, each with a "role" and usually a "content".

        `variables` are handed to the template (such as tools, or enable_thinking). Raises TokenizerError when there is
        no template, or when the template is broken or refuses the messages.
        """
        if self._template is None:
            raise TokenizerError(f"{self._place}: has no chat template; pass plain text instead of a chat")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise TokenizerError(f"chat message {number} is {message!r}; it must have a 'role' and a 'content'")
        context = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._compiled_template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **context
            )
        except Exception as error:  # a template is a stranger's program: anything can go wrong in it
            raise TokenizerError(f"{self._place}: the chat template failed: {_one_line(error)}") from None

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        assert self._template is not None
        return environment.from_string(self._template)

    @cached_property
    def _opens_with_space(self) -> bool:
        opening = self.encode("\n", bos=False)
        return self.encode("\na", bos=False)[len(opening) :] != self.encode("a", bos=False)


def fault(text: str) -> str:
    """What keeps a text from being one, such as half a surrogate pair, which JSON can spell; "" of a text that is fine."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has {text[error.start]!a} at place {error.start}, which is no character"
    return ""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, a mark for training that renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 asks for this attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a model has not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or tokenizer_config.json's, or chat_template.json's.

    A list of named templates means the one called "default", or its only one.
    """
    file, legacy = folder / "chat_template.jinja", folder / "chat_template.json"
    if file.is_file():
        return read_text(file, TokenizerError)
    source = settings.get("chat_template")
    if source is None and legacy.is_file():
        source = read_json(legacy, TokenizerError).get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default", next(iter(named.values())) if len(named) == 1 else source)
    if source is not None and not isinstance(source, str):
        raise TokenizerError(
            f"{folder}: 'chat_template' is neither a string nor a list with a template named 'default'"
        )
    return source


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""The chat templates of a folder: where they are found, which one is meant, and what is given to it.

As in transformers 5: files win over tokenizer_config.json, `chat_template.jinja` is the one called "default", a folder
`additional_chat_templates` holds others by name, and one called "tool_use" is taken where there are tools.
What cannot be read or is no template stands in the way of nothing until it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.config import read_json
from modeling.errors import TokenizerError
from modeling.text.characters import brief, fault
from modeling.text.renderer import PLAIN, Renderer

DEFAULT, TOOL_USE = "default", "tool_use"
LONGEST = 1 << 20  # bytes of a template; known ones have some 20,000
DEEPEST = 100  # lists and objects within each other in what a template is given
MOST_BITS = 14_000  # of a whole number; Python reads no more digits than 4,300
RESERVED = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")  # what a template always has
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # what a message's reasoning is called; templates read the first
OBJECTS = ("tools", "documents")  # variables that are a list of objects, or nothing
LFS = b"version https://git-lfs"

Source = str | TokenizerError  # a template's text, or why there is none


def find_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Source]:
    """The templates of a folder by name; `settings` is its tokenizer_config.json."""
    found: dict[str, Source] = {}
    file, more, legacy = (
        folder / name for name in ("chat_template.jinja", "additional_chat_templates", "chat_template.json")
    )
    if file.exists() or file.is_symlink():
        found[DEFAULT] = _read(file)
    for path in sorted(more.glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = _read(path)
    given = settings.get("chat_template")
    if not found and given is None and legacy.is_file():
        try:
            given = read_json(legacy, TokenizerError).get("chat_template")
        except TokenizerError as error:
            return {DEFAULT: error}
    return found or _listed(given, folder)


def _read(file: Path) -> Source:
    try:
        if file.exists() and not file.is_file():
            return TokenizerError(f"{file}: is no regular file; put the template there, or {PLAIN}")
        with file.open("rb") as content:
            raw = content.read(LONGEST + 1)
        if raw.startswith(LFS):
            return TokenizerError(f"{file}: is a Git LFS pointer, not the template; fetch it with `git lfs pull`")
        text = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        return TokenizerError(f"{file}: unreadable ({reason}); copy or download the file again, or {PLAIN}")
    return _bounded(text, str(file))


def _listed(given: Any, folder: Path) -> dict[str, Source]:
    """What a JSON file has under "chat_template": a text, or several by name in a list or an object."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: _bounded(given, str(folder))}
    if isinstance(given, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in given
    ):
        given = {entry["name"]: entry.get("template") for entry in given}
    if not isinstance(given, dict) or not given:
        kinds = "neither a string nor a list of templates with a name each"
        return {DEFAULT: TokenizerError(f"{folder}: 'chat_template' is {kinds}; mend it, or {PLAIN}")}
    named: dict[str, Source] = {
        name: _bounded(source, f"{folder}: chat template {name!r}")
        if isinstance(source, str)
        else TokenizerError(f"{folder}: chat template {name!r} is no text; mend it, or {PLAIN}")
        for name, source in given.items()
    }
    return named if len(named) > 1 else {DEFAULT: next(iter(named.values())), **named}


def _bounded(source: str, place: str) -> Source:
    if len(source) <= LONGEST:
        return source
    return TokenizerError(f"{place}: has more than {LONGEST:,} characters, which no chat template has; {PLAIN}")


class ChatTemplates:
    """The templates of a tokenizer, ready to render.

    Args:
        sources: by name.
        place: named in errors.
    """

    def __init__(self, sources: Mapping[str, Source], place: str) -> None:
        self._sources, self._place = dict(sources), place
        self._renderers: dict[str, Renderer] = {}

    def __bool__(self) -> bool:
        """Whether there is a template, if only one that is broken."""
        return bool(self._sources)

    @property
    def default(self) -> str | None:
        """The source of the template that is used when none is named; None where there is no such template."""
        source = self._sources.get(DEFAULT)
        return source if isinstance(source, str) else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        name: str | None,
    ) -> str:
        """See Tokenizer.render."""
        given = plain_variables(variables)
        renderer = self._renderer(name, given.get("tools"))
        if not isinstance(messages, Iterable):
            raise TokenizerError(
                f"chat messages {brief(messages)} are no list of messages, each with a 'role' and a 'content'"
            )
        said = []  # messages without what is None, and with their reasoning under its other names, as in transformers
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise TokenizerError(
                    f"chat message {number} is {brief(message)}; it must have a 'role' and a 'content'"
                )
            plain = _plain(message, f"chat message {number}")
            said.append(_named_alike({key: value for key, value in plain.items() if value is not None}))
        if not said:
            raise TokenizerError(f"{self._place}: a chat without a message cannot be rendered; give at least one")
        return renderer.text(
            {
                "tools": None,
                "documents": None,
                **special_tokens,
                **given,
                "messages": said,
                "add_generation_prompt": bool(add_generation_prompt),
            }
        )

    def unread(self, variables: Mapping[str, Any], name: str | None) -> list[str]:
        """Those of the variables that the template never reads.

        Raises:
            TokenizerError: there is no such template, it is broken, or a variable is none that it can be given.
        """
        given = plain_variables(variables)
        read = self._renderer(name, given.get("tools")).names()
        return [variable for variable in given if variable not in read]

    def _renderer(self, name: str | None, tools: Any) -> Renderer:
        if not self._sources:
            raise TokenizerError(f"{self._place}: has no chat template; pass plain text instead of a chat")
        chosen = self._name(name, tools)
        if chosen is None:
            names = ", ".join(sorted(self._sources))
            wrong = f"none called {brief(name)}" if name is not None else f"none called {DEFAULT!r}"
            raise TokenizerError(
                f"{self._place}: has chat templates named {names}, and {wrong}; choose one by name "
                f"(--template-name, template_name=), or {PLAIN}"
            )
        source = self._sources[chosen]
        if isinstance(source, TokenizerError):
            raise source
        if chosen not in self._renderers:
            self._renderers[chosen] = Renderer(source, self._place)
        return self._renderers[chosen]

    def _name(self, name: str | None, tools: Any) -> str | None:
        """Which template is meant, None if it cannot be said."""
        if name is not None:
            return name if isinstance(name, str) and name in self._sources else None
        if tools is not None and TOOL_USE in self._sources:
            return TOOL_USE
        return DEFAULT if DEFAULT in self._sources else None


def _named_alike(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning, if any, as `reasoning_content`, and as `thinking` where it has none.

    The order of keys, which a template can show, is that of transformers.
    """
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a template as JSON holds them.

    Raises:
        TokenizerError: JSON does not hold one; a name that is no name, or that says what the template always gets; or tools or
            documents that are no list of objects, which transformers refuses as well.
    """
    if not isinstance(variables, Mapping):
        raise TokenizerError(
            f"template variables {brief(variables)}: give names and values, such as {{'enable_thinking': False}}"
        )
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier():
            raise TokenizerError(
                f"template variable {brief(name)}: is no name of a variable; use letters, digits and _"
            )
        if name in RESERVED:
            raise TokenizerError(f"template variable {name!r}: is what the chat itself says; choose another name")
    plain = {name: _plain(value, f"template variable {name!r}") for name, value in variables.items()}
    for name in OBJECTS:
        given = plain.get(name)
        if given is not None and not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
            raise TokenizerError(f"template variable {name!r} is {brief(given)}; it must be a list of objects")
    return plain


def _plain(value: Any, place: str, depth: int = 0) -> Any:
    """The value as JSON holds it; tuples become lists.

    Raises:
        TokenizerError: JSON does not hold it, or it is too deep.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if wrong := fault(value):
            raise TokenizerError(f"{place} {wrong}; mend it first")
        return str.__str__(value)  # of an enum: what it stands for
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return int.__int__(value)
    if isinstance(value, float) and math.isfinite(value):
        return float.__float__(value)
    if isinstance(value, Mapping | list | tuple):
        if depth == DEEPEST:
            raise TokenizerError(f"{place} is more than {DEEPEST} lists and objects deep; flatten it")
        if not isinstance(value, Mapping):
            return [_plain(item, place, depth + 1) for item in value]
        if all(isinstance(key, str) for key in value):
            return {_plain(key, place): _plain(item, place, depth + 1) for key, item in value.items()}
        value = next(key for key in value if not isinstance(key, str))
        raise TokenizerError(f"{place} has the key {brief(value)}, which is no text; name it by a string")
    shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    if isinstance(value, int):
        shown = "a number of more digits than any file may hold"
    raise TokenizerError(
        f"{place} holds {shown}; give what JSON can hold: text, numbers, true, false, null, lists, objects"
    )

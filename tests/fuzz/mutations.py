"""From valid JSON outward: edits that a careless tool, a broken disk or a hostile mind makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = "[" * 3000 + "]" * 3000
RAW = {  # what json.dumps cannot write, by the text that stands for it
    "@@deep@@": DEEP,
    "@@digits@@": "1" + "0" * 5000,
    "@@huge@@": "1" + "0" * 400,
    "@@infinity@@": "Infinity",
    "@@nan@@": "NaN",
    "@@exponent@@": "1e999",
    "@@surrogate@@": '"\\ud800"',
    "@@zero@@": '"a\\u0000b"',
    "@@clipboard@@": '"\\u001b]52;c;aGk=\\u0007"',
}
WORDS = [
    "",
    "a",
    "none",
    "null",
    "../x",
    "[red]x[/red]",
    "<s>",
    "</s>",
    "{{ 1 }}",
    "\n\n",
    "x" * 5000,
    "auto",
    "restkv",
    *RAW,
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    1.0,
    0.5,
    -0.0,
    1e-320,
    1e308,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**9,
]
HOSTILE: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, *NUMBERS, *WORDS]

Path = tuple[str | int, ...]


def written(value: Any) -> str:
    """JSON text, with what RAW stands for in its place."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def places(value: Any, path: Path = ()) -> list[Path]:
    """Every place inside a JSON value, the whole of it first. Of long lists, the first and last entries."""
    found: list[Path] = [path]
    if isinstance(value, dict):
        entries: Sequence[tuple[str | int, Any]] = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        return found
    if len(entries) > 12:
        entries = [*entries[:8], *entries[-4:]]
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _hostile(draw: st.DrawFn) -> Any:
    """A copy: what one case edits must not be what the next one begins with."""
    return copy.deepcopy(draw(st.sampled_from(HOSTILE)))


@st.composite
def edited(draw: st.DrawFn, value: Any, keys: Sequence[str] = (), least: int = 1, most: int = 3) -> Any:
    """A copy of a JSON value after a few edits.

    Args:
        keys: names that may be added to an object, such as those that another reader of the file knows.
    """
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(least, most))):
        known = places(value)
        path = draw(st.sampled_from(known[1:] or known))
        if not path:
            return _hostile(draw)
        holder, key = _at(value, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["replace", "replace", "nudge", "delete", "copy", "add", "repeat"]))
        if kind == "replace":
            holder[key] = _hostile(draw)
        elif kind == "nudge" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = draw(st.sampled_from([-1, 0.5, 2, 3, 16, 1000])) * holder[key]
        elif kind == "delete":
            del holder[key]
        elif kind == "copy":
            holder[key] = copy.deepcopy(_at(value, draw(st.sampled_from(known))))
        elif kind == "repeat" and isinstance(holder[key], list):
            holder[key] = holder[key] * draw(st.integers(2, 4))
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*keys, "x"]))] = _hostile(draw)
    return value


@st.composite
def torn(draw: st.DrawFn, text: str) -> bytes:
    """The bytes of a text, cut short, doubled, with bytes changed, or as they are."""
    data = text.encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["whole"] * 8 + ["cut", "changed", "doubled", "marked"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "changed" and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == "doubled":
        return data + data
    return b"\xef\xbb\xbf" + data if kind == "marked" else data

"""What a manifest and its results must hold before a table is made of them: names, types and ranges, by the kind of run.

A folder of results may have been edited, mixed up, or made by something else; a table of it would be wrong or fail somewhere
in its making. Each check raises ValueError with what is wrong; bench/report/kinds.py adds where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from restkv.saving.strict_json import shown

LARGEST = 1e15  # of any number in a manifest or a row
LONGEST = 4096  # letters of a name
MOST = 1000  # methods, lengths, tasks, ... of a run

Check = Callable[[Any], bool]


def number(least: float = -LARGEST, most: float = LARGEST) -> Check:
    """An int or a float in a range; JSON's true and false are none."""
    return lambda value: type(value) in (int, float) and least <= value <= most


def whole(least: int = 0) -> Check:
    return lambda value: type(value) is int and least <= value <= LARGEST


def name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def boolean(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*values: Any) -> Check:
    return lambda value: isinstance(value, str | None) and value in values


def maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def many(check: Check, least: int = 0) -> Check:
    return lambda value: isinstance(value, list) and least <= len(value) <= MOST and all(map(check, value))


def mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def described(value: Any) -> bool:
    """A method in a manifest."""
    return isinstance(value, dict) and maybe(name)(value.get("preset")) and isinstance(value.get("policy", {}), dict)


Fields = Mapping[str, Check]

MODE = one_of("aware", "agnostic")
ASKED: Check = number(least=0)
SCORE = number(0, 1)

# Of every manifest, as far as they are there.
GENERAL: Fields = {
    "kind": name,
    "arguments": mapping(lambda value: True),
    "versions": mapping(name),
    "methods": mapping(described),
    "check": name,
}
# What a report says of how a run was made.
MADE: Fields = {
    "kind": name,
    "arguments": mapping(lambda value: True),
    "versions": mapping(name),
    "methods": mapping(lambda value: described(value) and "preset" in value and "policy" in value),
    "model": lambda value: isinstance(value, dict) and name(value.get("fingerprint")),
    "machine": mapping(lambda value: value is None or name(value) or number()(value)),
    "started": name,
}

_METHODS: Fields = {"methods": many(name, 1)}
_GRID: Fields = {
    **_METHODS,
    "tasks": many(name, 1),
    "lengths": many(whole(1), 1),
    "depths": many(maybe(number(0, 1)), 1),
    "compression": many(number(1), 1),
    "samples": whole(1),
    "question": one_of("aware", "agnostic", "both"),
}
_COUNTED: Fields = {**_METHODS, "results": whole()}
_OFFICIAL: Fields = {
    **_COUNTED,
    "tasks": many(name, 1),
    "budgets": many(ASKED),
    "protocol": name,
    "checkpoint": name,
    "model": name,
    "max_length": maybe(whole()),
}
ARGUMENTS: Mapping[str, Fields] = {
    "ruler": _GRID,
    "needle": _GRID,
    "fidelity": {**_COUNTED, "context": whole(1), "oracle_context": whole(1)},
    "anli": {**_COUNTED, "tasks": many(name, 1)},
    "perplexity": {
        **_COUNTED,
        "protocol": one_of("streaming", "prefill", "chunked"),
        "tokens": whole(),
        "context": whole(),
        "chunk": whole(),
    },
    "smoothing": {**_COUNTED, "compression": many(number(1), 1), "tasks": many(name)},
    "longbench": _OFFICIAL,
    "infinitebench": _OFFICIAL,
    "ruler-official": _OFFICIAL,
    "needle-official": _OFFICIAL,
}

_SCORED: Fields = {"method": name, "kept": number(0), "score": SCORE, "task": name, "index": whole()}
_CHOICE: Fields = {**_SCORED, "question": MODE, "asked": ASKED}
_PLACED: Fields = {
    **_SCORED,
    "question": MODE,
    "length": whole(1),
    "depth": maybe(number(0, 1)),
    "compression": number(1),
}
_READ: Fields = {
    "method": name,
    "kept": number(0),
    "asked": ASKED,
    "window": whole(),
    "nll": number(),
    "tokens": whole(1),
    "words": whole(),
    "text_bytes": whole(),
}
_TEXT: Fields = {
    "method": name,
    "entries": whole(),
    "kept": number(0),
    "kl": number(),
    "top1": SCORE,
    "nll": number(),
    "full_nll": number(),
    "error": maybe(many(number(), 1)),
}
_ORACLE: Fields = {
    "method": name,
    "entries": whole(),
    "kept": number(0),
    **{part: maybe(many(number(), 1)) for part in ("error", "window", "future", "overlap")},
}
_ANSWERED: Fields = {
    **_SCORED,
    "length": maybe(whole()),
    "depth": maybe(number(0, 1)),
    "budget": maybe(ASKED),
    "wording": name,
    "chat": boolean,
    "tokens": whole(),
    "cut": whole(),
}
ROWS: Mapping[str, Fields | Mapping[str, Fields]] = {
    "ruler": _PLACED,
    "needle": {**_PLACED, "depth": number(0, 1)},
    "anli": _CHOICE,
    "perplexity": _READ,
    "longbench": _ANSWERED,
    "infinitebench": _ANSWERED,
    "ruler-official": {**_ANSWERED, "length": whole(1)},
    "needle-official": {**_ANSWERED, "length": whole(1), "depth": number(0, 1)},
}
PARTS: Mapping[str, Mapping[str, Fields]] = {  # kinds whose rows are of several parts
    "fidelity": {"text": _TEXT, "oracle": _ORACLE},
    "smoothing": {"perplexity": _READ, "choice": _CHOICE},
}
# Fields whose values are among those of an argument, so that tables and figures have no more places than were asked for.
AMONG = {"method": "methods", "length": "lengths", "depth": "depths", "task": "tasks"}


def require(fields: Fields, value: Mapping[str, Any], all_of_them: bool = True) -> None:
    """Names, types and ranges of an object.

    Raises:
        ValueError: names the first that is not as it should be.
    """
    for field, fits in fields.items():
        if field not in value:
            if all_of_them:
                raise KeyError(field)
        elif not fits(value[field]):
            raise ValueError(f"{field} is {shown(value[field])}")


def require_row(kind: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """A result of a run of this kind.

    Raises:
        KeyError: it lacks a field. ValueError: a field is not as it should be.
    """
    fields: Any = ROWS.get(kind)
    if kind in PARTS:
        if not one_of(*PARTS[kind])(row["part"]):
            raise ValueError(f"part is {shown(row['part'])}")
        fields = PARTS[kind][row["part"]]
    require(fields, row)
    for field, argument in AMONG.items():
        values = arguments.get(argument)
        if not isinstance(values, list) or not values or None in values:  # a depth of None is left to the task
            continue
        if field in fields and row[field] is not None and row[field] not in values:
            raise ValueError(f"{field} is {shown(row[field])}, which is not among the run's {argument}")
    budgets: Sequence[Any] = arguments.get("budgets", ())
    if fields is _ANSWERED and row["budget"] is not None and row["budget"] not in budgets:
        raise ValueError(f"budget is {shown(row['budget'])}, which is not among the run's budgets")

"""What a manifest and its results must hold before a table is made of them: names, types and ranges.

A folder of results may have been edited, mixed up, or made by something else; a table of it would be wrong or fail somewhere
in its making. What those of a benchmark must hold besides it says itself (bench/runs/benchmark.py). A check raises ValueError
with what is wrong; bench/report/kinds.py adds where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Absent:
    """A check of a field that older rows and manifests do not have."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __call__(self, value: Any) -> bool:
        return self._check(value)


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

# Of every row, as far as tables are made of it.
ROW: Fields = {"method": name, "asked": ASKED, "kept": number(0)}
SCORED: Fields = {"score": SCORE, "task": name, "index": whole()}  # an answer that is right to some degree
LAYERS = many(number(), 1)
# Fields whose values are among those of an argument, so that tables and figures have no more places than were asked for.
AMONG = {"method": "methods", "length": "lengths", "depth": "depths", "task": "tasks", "asked": "budgets"}


def require(fields: Fields, value: Mapping[str, Any], all_of_them: bool = True) -> None:
    """Names, types and ranges of an object.

    Raises:
        ValueError: names the first that is missing (if they must all be there), or not as it should be.
    """
    for field, fits in fields.items():
        if field in value and not fits(value[field]):
            raise ValueError(f"{field} is {shown(value[field])}")
        if field not in value and all_of_them and not isinstance(fits, Absent):
            raise ValueError(f"{field!r} is missing")


def require_row(rows: Fields | Mapping[str, Fields], arguments: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """A result; `rows` and `arguments` are those of its benchmark and its run.

    Raises:
        ValueError: a field is missing, or not as it should be.
    """
    fields: Any = rows
    if all(isinstance(part, Mapping) for part in rows.values()):
        require({"part": one_of(*rows)}, row)
        fields = rows[row["part"]]
    fields = {**ROW, **fields}
    require(fields, row)
    for field, argument in AMONG.items():
        values = arguments.get(argument)
        if not isinstance(values, list) or not values or None in values:  # a depth of None is left to the task
            continue
        full = field == "asked" and row["method"] == "full"
        if field in fields and row[field] is not None and row[field] not in values and not full:
            raise ValueError(f"{field} is {shown(row[field])}, which is not among the run's {argument}")

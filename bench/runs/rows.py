"""A row of results: one type for all benchmarks, and readers of what earlier versions wrote.

A folder's manifest has the format of its rows. They are written in FORMAT and read in any of READERS, so that whoever makes
tables of them knows the names of this version alone:

    key          what it is the result of, unique in its folder
    ...          the same in words: part, question, task, length, depth, index, window, ... as far as a benchmark has such
    method ...   the cell and the policy it became, see Row
    kept, bytes  what the policy held of the prompt
    ...          what was measured
    versions     of what results depend on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

FORMAT = 2
FULL = "full"  # the method that keeps everything


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        about: what it is of, besides the cell.
        method, preset: as `--methods` has them.
        asked: the budget as it was asked for: entries, a share of the prompt, or a compression; 1.0 for the full cache.
        entries: what that comes to per KV head; None for the full cache.
        granularity, budget, observed: of the policy: sets per KV head or per query head, entries per set, its `window`.
        kept: entries per layer and KV head after the prompt.
        bytes: of these; None where nobody has counted them.
        measures: what was found.
    """

    about: Mapping[str, Any]
    method: str
    preset: str | None
    asked: int | float
    entries: int | None
    granularity: str
    budget: int | float | tuple[int, ...] | None
    observed: int
    kept: float
    bytes: int | None
    measures: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """JSON-ready, in the order in which it is written."""
        cell = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("about", "measures")}
        line = {**self.about, **cell, **self.measures}
        assert len(line) == len(self.about) + len(cell) + len(self.measures), "two fields of one name"
        return line


def _from_1(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 had four dialects: retrieval's, fidelity's, the published benchmarks', and one for all that is not generated."""
    row = dict(row)
    if "compression" in row:  # retrieval
        row["asked"] = row.pop("compression")
        row["observed"] = row.pop("window", None)
    elif "wording" in row:  # published; `budget` was what was asked for, and a policy's is its entries
        if "budget" in row:
            asked = row["budget"]
            row |= {"asked": 1.0, "budget": None} if asked is None else {"asked": asked, "budget": row.get("entries")}
        row["observed"] = row.pop("window", None)
    elif kind == "fidelity" and row.get("part") == "oracle":  # a measure had taken the place of the window's name
        row |= {f"{name}_error": row.pop(name) for name in ("window", "future") if name in row}
        row["window"] = row["key"].removeprefix("oracle/").rsplit("/", 2)[0]
    if row.get("method") == FULL:
        row["entries"] = None
    return row


READERS: Mapping[int, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    1: _from_1,
    FORMAT: lambda kind, row: dict(row),
}

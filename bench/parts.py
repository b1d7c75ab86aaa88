"""What a report shows of a run, by its kind; whatever part of its rows there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench import tables_likelihood
from bench.official import tables as official
from bench.runs import SAMPLES, RunError
from bench.tables import Part, Row, fidelity_parts, needle_parts, ruler_parts

MAKERS = {
    "ruler": ruler_parts,
    "needle": needle_parts,
    "fidelity": fidelity_parts,
    **tables_likelihood.MAKERS,
}


def parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and figures of a run, in reading order.

    Raises:
        RunError: a row lacks something (it is named).
    """
    if not rows:
        return []
    make = partial(official.parts, kind) if kind in official.TITLES else MAKERS[kind]
    try:
        return make(arguments, rows)
    except KeyError as error:
        whole = [row for row in rows if error.args[0] in row]
        if not whole or len(whole) == len(rows):
            raise  # not a row that lacks what others have
        broken = next(row["key"] for row in rows if error.args[0] not in row)
        raise RunError(f"result {broken!r} has no {error}; delete its line of {SAMPLES} and run again") from None


def progress(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> tuple[int, int]:
    """Rows there are, and rows of the complete run."""
    if "results" in arguments:
        return len(rows), arguments["results"]
    evicting = len(arguments["methods"]) - 1  # all but the full cache
    modes = 2 if arguments["question"] == "both" else 1
    places = len(arguments["tasks"]) * len(arguments["lengths"]) * len(arguments["depths"])
    cells = 1 + evicting * len(arguments["compression"])
    return len(rows), arguments["samples"] * places * modes * cells

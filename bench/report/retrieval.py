"""Tables and figures of retrieval: ruler and needle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.report import tables
from bench.report.figures import Grid, heat_maps
from bench.report.stats import grouped
from bench.report.tables import Drawing, Part, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ruler_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    places = grouped(rows, "question", "length")
    for (mode, length), part in places.items():
        if len({row["method"] for row in part}) > 1:  # one alone is compared with nothing
            caption = f"{length} tokens, {tables.QUESTION[mode]}: mean over tasks [95 %]"
            made.append(tables.rate_table(caption, tables.accuracies(part, arguments), arguments))
    for (mode, length), part in places.items():
        made.append(tables.accuracy_table(f"{length} tokens, {tables.QUESTION[mode]}", "task", part, arguments, "x"))
    for (mode,), part in grouped(rows, "question").items():
        panels = [
            tables.panel(f"{length} tokens", tables.accuracies(some, arguments), arguments)
            for (length,), some in grouped(part, "length").items()
        ]
        caption = f"Accuracy against compression, {tables.QUESTION[mode]}. Mean over tasks; bars are 95 % intervals."
        made += tables.drawing(caption, panels, arguments, "compression", "accuracy", y_limits=(-0.03, 1.03))
    return made


def needle_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    for (mode,), part in grouped(rows, "question").items():
        made.append(tables.accuracy_table(f"Needles found, {tables.QUESTION[mode]}", "length", part, arguments, "x"))
        caption = f"Needles found by depth and length, {tables.QUESTION[mode]}. 1 is all of them."
        made.append(Drawing(caption, partial(needle_figure, needle_grids(part))))
    return made


def needle_grids(rows: Sequence[Row]) -> list[Grid]:
    """Mean score by depth (down) and length (across), one map per method."""
    depths, lengths = sorted({row["depth"] for row in rows}), sorted({row["length"] for row in rows})
    grids = []
    for (method,), part in grouped(rows, "method").items():
        means = {
            place: tables.plain_mean(row["score"] for row in some)
            for place, some in grouped(part, "depth", "length").items()
        }
        values = [[means.get((depth, length)) for length in lengths] for depth in depths]
        grids.append(Grid(method, [f"{depth:.0%}" for depth in depths], list(map(str, lengths)), values))
    return grids


def needle_figure(grids: Sequence[Grid]) -> Figure:
    return heat_maps(grids, "depth of the needle", "tokens", "needle found")

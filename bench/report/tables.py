"""Tools that tables and figures of rows are made with: cells in order, accuracies, tables of them, lines and panels.

A figure is a description and a function that draws it, so that tables need no matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.report.figures import Line, Panel, line_panels
from bench.report.stats import Estimate, grouped, mean_interval, paired_difference
from bench.runs.benchmark import Drawing, Part, Table
from bench.runs.rows import FULL

Row = Mapping[str, Any]
MOST_PANELS = 60
QUESTION = {
    "aware": "question in sight while evicting (query-aware)",
    "agnostic": "context compressed before the question (query-agnostic)",
}


def by_cell(rows: Sequence[Row], arguments: Mapping[str, Any], rate: str = "asked") -> list[tuple[str, Any, list[Row]]]:
    """(method, budget as asked for, rows): the full cache first, then by `rate`; methods in the order of the arguments."""
    order = {label: index for index, label in enumerate(arguments["methods"])}
    cells = [(method, value, part) for (method, value), part in grouped(rows, "method", rate).items()]
    return sorted(cells, key=lambda cell: (cell[0] != FULL, cell[1], order[cell[0]]))


def scores_of(rows: Sequence[Row], by: str) -> dict[Any, dict[str, float]]:
    """Group -> sample -> score."""
    names = ("task", "length", "depth", "index")
    return {
        group: {"/".join(str(row.get(name)) for name in names): row["score"] for row in part}
        for (group,), part in grouped(rows, by).items()
    }


def accuracy(rows: Sequence[Row], by: str = "task") -> Estimate:
    """Mean over groups of the mean scores of their samples."""
    return mean_interval(*(list(values.values()) for values in scores_of(rows, by).values()))


def accuracies(rows: Sequence[Row], arguments: Mapping[str, Any]) -> dict[tuple[str, Any], Estimate]:
    """(method, budget as asked for) -> accuracy."""
    return {(method, at): accuracy(part) for method, at, part in by_cell(rows, arguments)}


def accuracy_table(caption: str, by: str, rows: Sequence[Row], arguments: Mapping[str, Any], unit: str = "") -> Table:
    """Mean score by group and over groups; the difference to the full cache is taken sample by sample."""
    groups = [group for group in arguments[f"{by}s"] if any(row[by] == group for row in rows)]
    full = scores_of([row for row in rows if row["method"] == FULL], by)
    lines = []
    for method, at, part in by_cell(rows, arguments):
        scores = scores_of(part, by)
        mean = accuracy(part, by)
        pairs = [(scores[group], full[group]) for group in scores if group in full]
        difference = None if method == FULL else paired_difference(*pairs)
        lines.append(
            [
                method,
                f"{at:g}{unit}",
                f"{plain_mean(row['kept'] for row in part):.0f}",
                *(f"{plain_mean(scores[group].values()):.3f}" if group in scores else "" for group in groups),
                str(mean),
                difference.show(sign="+") if difference else "",
                str(mean.n),
            ]
        )
    return Table(caption, ["method", "at", "kept", *map(str, groups), "mean [95 %]", "minus full [95 %]", "n"], lines)


def method_lines(points: Mapping[tuple[str, Any], Estimate], arguments: Mapping[str, Any]) -> list[Line]:
    """(method, x) -> estimate as one line per method."""
    lines = []
    for label in arguments["methods"]:
        some = sorted((x, estimate) for (method, x), estimate in points.items() if method == label)
        if some:
            lines.append(Line(label, [x for x, _ in some], [estimate for _, estimate in some]))
    return lines


def panel(title: str, points: Mapping[tuple[str, Any], Estimate], arguments: Mapping[str, Any]) -> Panel:
    """(method, x) -> estimate as one line per method, and the full cache as the level they are compared with."""
    level = next((point for (method, _), point in points.items() if method == FULL), None)
    evicting = {cell: point for cell, point in points.items() if cell[0] != FULL}
    return Panel(title, method_lines(evicting, arguments), level)


def drawing(
    caption: str,
    panels: Sequence[Panel],
    arguments: Mapping[str, Any],
    x: str,
    y: str,
    log_x: bool = True,
    **options: Any,
) -> list[Part]:
    """A figure of the panels that have lines; none where only the full cache has been run, or there are more than anybody
    looks at. options: of line_panels.
    """
    drawn = [one for one in panels if one.lines]
    if not drawn or len(drawn) > MOST_PANELS:
        return []
    return [Drawing(caption, partial(line_panels, drawn, arguments["methods"][1:], x, y, log_x=log_x, **options))]


def plain_mean(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / len(some)

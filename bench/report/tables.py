"""Tools that tables and figures of rows are made with: cells in order, accuracies, tables of them, lines and panels.

A figure is a description and a function that draws it, so that tables need no matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.report.figures import Line, Panel, line_panels
from bench.report.stats import Estimate, Values, grouped, mean_interval, paired_difference
from bench.runs.benchmark import Drawing, Part, Table
from bench.runs.rows import FULL

Row = Mapping[str, Any]
Column = Callable[[Sequence[Row]], str]  # what a cell's rows come to
SAMPLE = ("task", "length", "depth", "index")  # what tells one from another
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


def scores_of(rows: Sequence[Row], *by: str, of: str = "score") -> Values:
    """Group -> sample -> score, or another field."""
    return {
        group: {tuple(row.get(name) for name in SAMPLE): row[of] for row in part}
        for group, part in grouped(rows, *by).items()
    }


def accuracy(rows: Sequence[Row], *by: str) -> Estimate:
    """Mean over groups of the mean scores of their samples."""
    return mean_interval(*(list(values.values()) for values in scores_of(rows, *by).values()))


def accuracies(rows: Sequence[Row], arguments: Mapping[str, Any]) -> dict[tuple[str, Any], Estimate]:
    """(method, budget as asked for) -> accuracy, the mean over tasks."""
    return {(method, at): accuracy(part, "task") for method, at, part in by_cell(rows, arguments)}


def minus_full(part: Sequence[Row], rows: Sequence[Row], values: Callable[[Sequence[Row]], Values]) -> Estimate | None:
    """A cell's values less those of the full cache (which is among `rows`), sample by sample; None of the full cache itself."""
    if part[0]["method"] == FULL:
        return None
    return paired_difference(values(part), values([row for row in rows if row["method"] == FULL]))


def signed(difference: Estimate | None, digits: int = 3) -> str:
    return difference.show(digits, sign="+") if difference else ""


def cell_table(
    caption: str, cells: Iterable[tuple[str, str, list[Row]]], columns: Mapping[str, Column], at: str = "at"
) -> Table:
    """A line for every cell, which has a method, a budget and rows: what was kept, what `columns` say, how many rows.

    Args:
        at: what the column of the budget is called.
    """
    lines = [
        [method, asked, kept(part), *(say(part) for say in columns.values()), str(len(part))]
        for method, asked, part in cells
    ]
    return Table(caption, ["method", at, "kept", *columns, "n"], lines)


def kept(rows: Sequence[Row]) -> str:
    return f"{plain_mean(row['kept'] for row in rows):.0f}"


def accuracy_table(caption: str, by: str, rows: Sequence[Row], arguments: Mapping[str, Any], unit: str = "") -> Table:
    """Mean score by group and over groups; the difference to the full cache is taken sample by sample."""

    def mean_in(group: Any) -> Column:
        def mean(part: Sequence[Row]) -> str:
            scores = [row["score"] for row in part if row[by] == group]
            return f"{plain_mean(scores):.3f}" if scores else ""

        return mean

    columns = {str(group): mean_in(group) for group in arguments[f"{by}s"] if any(row[by] == group for row in rows)}
    columns["mean [95 %]"] = lambda part: str(accuracy(part, by))
    columns["minus full [95 %]"] = lambda part: signed(minus_full(part, rows, lambda some: scores_of(some, by)))
    cells = [(method, f"{at:g}{unit}", part) for method, at, part in by_cell(rows, arguments)]
    return cell_table(caption, cells, columns)


def rate_table(
    caption: str,
    cells: Mapping[tuple[str, Any], Estimate],
    arguments: Mapping[str, Any],
    show: Callable[[Estimate], str] = str,
) -> Table:
    """Methods down, compressions across; the full cache, which has none, stands in every column."""
    rates = sorted({rate for method, rate in cells if method != FULL})
    methods = [label for label in arguments["methods"] if any(label == method for method, _ in cells)]
    places = {label: [(label, 1.0 if label == FULL else rate) for rate in rates] for label in methods}
    lines = [[label, *(show(cells[at]) if at in cells else "" for at in places[label])] for label in methods]
    return Table(caption, ["method", *(f"{rate:g}x" for rate in rates)], lines)


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

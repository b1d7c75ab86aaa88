"""From rows of results to tables and figures: retrieval and fidelity, and tools for other kinds of runs (bench/report/kinds.py).

A figure is a description and a function that draws it, so that tables need no matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.quality.needle import needle_figure, needle_grids
from bench.report.figures import Line, Panel, line_panels
from bench.report.stats import Estimate, exp, grouped, mean_interval, paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
FULL = "full"
MOST_PANELS = 60
QUESTION = {
    "aware": "question in sight while evicting (query-aware)",
    "agnostic": "context compressed before the question (query-agnostic)",
}


@dataclass(frozen=True)
class Table:
    """A caption, column heads and lines of text."""

    caption: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn when it is wanted."""

    caption: str
    draw: Callable[[], Figure]


Part = Table | Drawing


# -- ruler and needle


def ruler_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    places = grouped(rows, "question", "length")
    for (mode, length), part in places.items():
        if len({row["method"] for row in part}) > 1:  # one alone is compared with nothing
            made.append(_overview(f"{length} tokens, {QUESTION[mode]}: mean over tasks [95 %]", part, arguments))
    for (mode, length), part in places.items():
        made.append(accuracy_table(f"{length} tokens, {QUESTION[mode]}", "task", part, arguments))
    for (mode,), part in grouped(rows, "question").items():
        panels = [
            panel(f"{length} tokens", accuracies(some, arguments, "compression"), arguments)
            for (length,), some in grouped(part, "length").items()
        ]
        caption = f"Accuracy against compression, {QUESTION[mode]}. Mean over tasks; bars are 95 % intervals."
        made += drawing(caption, panels, arguments, "compression", "accuracy", y_limits=(-0.03, 1.03))
    return made


def needle_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    for (mode,), part in grouped(rows, "question").items():
        made.append(accuracy_table(f"Needles found, {QUESTION[mode]}", "length", part, arguments))
        caption = f"Needles found by depth and length, {QUESTION[mode]}. 1 is all of them."
        made.append(Drawing(caption, partial(needle_figure, needle_grids(part))))
    return made


def by_cell(rows: Sequence[Row], arguments: Mapping[str, Any], rate: str) -> list[tuple[str, Any, list[Row]]]:
    """(method, compression or budget, rows): the full cache first, then by rate; methods in the order of the arguments."""
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


def accuracies(rows: Sequence[Row], arguments: Mapping[str, Any], rate: str) -> dict[tuple[str, Any], Estimate]:
    """(method, compression or budget) -> accuracy."""
    return {(method, at): accuracy(part) for method, at, part in by_cell(rows, arguments, rate)}


def _overview(caption: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Methods down, compressions across; the full cache, which has none, stands in every column."""
    means = accuracies(rows, arguments, "compression")
    rates = sorted({rate for method, rate in means if method != FULL})
    lines = [
        [method, *(str(means.get((method, 1.0 if method == FULL else rate), "")) for rate in rates)]
        for method in arguments["methods"]
        if any(label == method for label, _ in means)
    ]
    return Table(caption, ["method", *(f"{rate:g}x" for rate in rates)], lines)


def accuracy_table(
    caption: str, by: str, rows: Sequence[Row], arguments: Mapping[str, Any], rate: str = "compression", unit: str = "x"
) -> Table:
    """Mean score by group and over groups; the difference to the full cache is taken sample by sample."""
    groups = [group for group in arguments[f"{by}s"] if any(row[by] == group for row in rows)]
    full = scores_of([row for row in rows if row["method"] == FULL], by)
    lines = []
    for method, at, part in by_cell(rows, arguments, rate):
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


# -- fidelity


def fidelity_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    by_part = {part: some for (part,), some in grouped(rows, "part").items()}
    made: list[Part] = []
    if text := by_part.get("text"):
        made += _text_parts(arguments, text)
    if oracle := [row for row in by_part.get("oracle", ()) if row["error"] is not None]:
        made += _oracle_parts(arguments, oracle)
    return made


def _text_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    lines, kl = [], {}
    prefill = arguments.get("prefill", "dense")  # runs from before there was a choice were dense
    for method, _, part in by_cell(rows, arguments, "entries"):
        if method == FULL and prefill == "dense":
            continue  # it is what all are compared with
        entries, divergence = part[0]["entries"], mean_interval([row["kl"] for row in part])
        if method != FULL:
            kl[method, entries] = divergence
        ratio = mean_interval([row["nll"] - row["full_nll"] for row in part])
        errors = [plain_mean(row["error"]) for row in part if row["error"] is not None]
        lines.append(
            [
                method,
                str(entries),
                f"{plain_mean(row['kept'] for row in part):.0f}",
                divergence.show(4),
                mean_interval([row["top1"] for row in part]).show(),
                ratio.through(exp).show(),
                mean_interval(errors).show() if errors else "positions renumbered",
                str(len(part)),
            ]
        )
    columns = ["method", "budget", "kept", "KL, nats/token", "top-1 agreement", "perplexity ratio", "layer error", "n"]
    caption = f"The full cache's next-token distribution, and what is left of it after {arguments['context']} tokens"
    caption += "" if prefill == "dense" else f" read by {prefill}"
    series = method_lines({cell: estimate for cell, estimate in kl.items() if estimate.mean > 0}, arguments)
    return [
        Table(f"{caption} (means over windows, 95 % intervals)", columns, lines),
        *drawing(
            "KL divergence from the full cache by entries per KV head. Bars are 95 % intervals over windows.",
            [Panel("", series)],
            arguments,
            "entries per KV head",
            "KL, nats/token",
            log_y=True,
        ),
        *drawing(
            "Relative error of each layer's attention output, by budget.",
            _layer_panels(rows, arguments),
            arguments,
            "layer",
            "relative error",
            log_x=False,
            log_y=True,
        ),
    ]


def _oracle_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    lines = []
    for method, _, part in by_cell(rows, arguments, "entries"):
        columns = ("error", "window", "future", "overlap")
        shown = [mean_interval([plain_mean(row[name]) for row in part]).show() for name in columns]
        lines.append(
            [method, str(part[0]["entries"]), f"{plain_mean(row['kept'] for row in part):.0f}", *shown, str(len(part))]
        )
    heads = ["method", "budget", "kept", "its set", "window oracle", "future oracle", "shared with the future's", "n"]
    context = arguments["oracle_context"]
    caption = f"Oracle gap at {context} tokens: relative error of attention outputs over the tail, mean over layers"
    return [
        Table(caption, heads, lines),
        _oracle_by_layer(arguments, rows),
        *drawing(
            "Oracle gap layer by layer: each method's set, and what greedy elimination keeps when judged by the prompt's last "
            "queries (window oracle) or by those to come (future oracle).",
            _layer_panels(rows, arguments, ("window", "future")),
            arguments,
            "layer",
            "relative error",
            log_x=False,
            log_y=True,
        ),
    ]


def _oracle_by_layer(arguments: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """The figure's numbers: a line for every set, a column for every layer."""
    lines = []
    for method, _, part in by_cell(rows, arguments, "entries"):
        for name, title in (("error", "its set"), ("window", "window oracle"), ("future", "future oracle")):
            layers = zip(*(row[name] for row in part), strict=True)
            lines.append([method, str(part[0]["entries"]), title, *(f"{plain_mean(layer):.3f}" for layer in layers)])
    heads = ["method", "budget", "set", *(f"layer {index}" for index in range(len(rows[0]["error"])))]
    return Table(
        f"Oracle gap at {arguments['oracle_context']} tokens, layer by layer (means over windows)", heads, lines
    )


def _layer_panels(rows: Sequence[Row], arguments: Mapping[str, Any], bounds: Sequence[str] = ()) -> list[Panel]:
    """One panel per budget: error by layer; oracles are drawn as they are beside the first method."""
    panels: dict[int, dict[str, Line]] = {}
    for method, entries, part in by_cell(rows, arguments, "entries"):
        known = [row for row in part if row["error"] is not None]
        if method == FULL or not known:
            continue
        lines = panels.setdefault(entries, {})
        for name in bounds:
            lines.setdefault(name, _by_layer(f"{name} oracle", known, name, bound=True))
        lines[method] = _by_layer(method, known, "error")
    return [Panel(f"{entries} entries", list(lines.values())) for entries, lines in sorted(panels.items())]


def _by_layer(label: str, rows: Sequence[Row], name: str, bound: bool = False) -> Line:
    layers = list(zip(*(row[name] for row in rows), strict=True))
    return Line(label, range(len(layers)), [mean_interval(layer) for layer in layers], bound)


def plain_mean(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / len(some)

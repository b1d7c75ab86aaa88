"""From rows of results to tables and figures, by kind of run; whatever part of the rows there is.

A figure is a description and a function that draws it, so that tables need no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.figures import Line, Panel, line_panels
from bench.needle import needle_figure, needle_grids
from bench.stats import Estimate, grouped, mean_interval, paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
FULL = "full"
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


def parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and figures of a run, in reading order."""
    from bench import tables_likelihood  # which takes its tools from here
    from bench.official import tables as official  # so does this

    if not rows:
        return []
    if kind in official.TITLES:
        return official.parts(kind, arguments, rows)
    makers = {"ruler": _ruler, "needle": _needle, "fidelity": _fidelity, **tables_likelihood.MAKERS}
    return makers[kind](arguments, rows)


def progress(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> tuple[int, int]:
    """Rows there are, and rows of the complete run."""
    if "results" in arguments:
        return len(rows), arguments["results"]
    evicting = len(arguments["methods"]) - 1  # all but the full cache
    if kind == "fidelity":
        short = [
            b for b in arguments["budgets"] if (b < 1 if isinstance(b, float) else b < arguments["oracle_context"])
        ]
        cells = arguments["windows"] * (1 + evicting * len(arguments["budgets"]))
        return len(rows), cells + arguments["oracle"] * evicting * len(short)
    modes = 2 if arguments["question"] == "both" else 1
    places = len(arguments["tasks"]) * len(arguments["lengths"]) * len(arguments["depths"])
    cells = 1 + evicting * len(arguments["compression"])
    return len(rows), arguments["samples"] * places * modes * cells


# -- ruler and needle


def _ruler(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    places = grouped(rows, "question", "length")
    for (mode, length), part in places.items():
        if len({row["method"] for row in part}) > 1:  # one alone is compared with nothing
            made.append(_overview(f"{length} tokens, {QUESTION[mode]}: mean over tasks [95 %]", part, arguments))
    for (mode, length), part in places.items():
        made.append(_accuracy_table(f"{length} tokens, {QUESTION[mode]}", "task", part, arguments))
    for (mode,), part in grouped(rows, "question").items():
        panels = _accuracy_panels(part, arguments)
        caption = f"Accuracy against compression, {QUESTION[mode]}. Mean over tasks; bars are 95 % intervals."
        if panels:
            made.append(
                Drawing(
                    caption,
                    partial(
                        line_panels,
                        panels,
                        arguments["methods"][1:],
                        "compression",
                        "accuracy",
                        log_x=True,
                        y_limits=(-0.03, 1.03),
                    ),
                )
            )
    return made


def _needle(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    for (mode,), part in grouped(rows, "question").items():
        made.append(_accuracy_table(f"Needles found, {QUESTION[mode]}", "length", part, arguments))
        caption = f"Needles found by depth and length, {QUESTION[mode]}. 1 is all of them."
        made.append(Drawing(caption, partial(needle_figure, needle_grids(part))))
    return made


def _cells(rows: Sequence[Row], arguments: Mapping[str, Any], rate: str) -> list[tuple[str, Any, list[Row]]]:
    """(method, compression or budget, rows): the full cache first, then by rate; methods in the order of the arguments."""
    order = {label: index for index, label in enumerate(arguments["methods"])}
    cells = [(method, value, part) for (method, value), part in grouped(rows, "method", rate).items()]
    return sorted(cells, key=lambda cell: (cell[0] != FULL, cell[1], order[cell[0]]))


def _scores(rows: Sequence[Row], by: str) -> dict[Any, dict[str, float]]:
    """Group -> sample -> score."""
    names = ("task", "length", "depth", "index")
    return {
        group: {"/".join(str(row.get(name)) for name in names): row["score"] for row in part}
        for (group,), part in grouped(rows, by).items()
    }


def _overview(caption: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Methods down, compressions across; the full cache, which has none, stands in every column."""
    means = {
        (method, rate): mean_interval(*(list(values.values()) for values in _scores(part, "task").values()))
        for method, rate, part in _cells(rows, arguments, "compression")
    }
    rates = sorted({rate for method, rate in means if method != FULL})
    lines = [
        [method, *(str(means.get((method, 1.0 if method == FULL else rate), "")) for rate in rates)]
        for method in arguments["methods"]
        if any(label == method for label, _ in means)
    ]
    return Table(caption, ["method", *(f"{rate:g}x" for rate in rates)], lines)


def _accuracy_table(
    caption: str, by: str, rows: Sequence[Row], arguments: Mapping[str, Any], rate: str = "compression", unit: str = "x"
) -> Table:
    """Mean score by group and over groups; the difference to the full cache is taken sample by sample."""
    groups = [group for group in arguments[f"{by}s"] if any(row[by] == group for row in rows)]
    full = _scores([row for row in rows if row["method"] == FULL], by)
    lines = []
    for method, at, part in _cells(rows, arguments, rate):
        scores = _scores(part, by)
        mean = mean_interval(*(list(values.values()) for values in scores.values()))
        pairs = [(scores[group], full[group]) for group in scores if group in full]
        difference = None if method == FULL else paired_difference(*pairs)
        lines.append(
            [
                method,
                f"{at:g}{unit}",
                f"{_mean(row['kept'] for row in part):.0f}",
                *(f"{_mean(scores[group].values()):.3f}" if group in scores else "" for group in groups),
                str(mean),
                difference.show(sign="+") if difference else "",
                str(mean.n),
            ]
        )
    return Table(caption, ["method", "at", "kept", *map(str, groups), "mean [95 %]", "minus full [95 %]", "n"], lines)


def _accuracy_panels(rows: Sequence[Row], arguments: Mapping[str, Any]) -> list[Panel]:
    """One panel per length; none where only the full cache has been run."""
    panels = []
    for (length,), part in grouped(rows, "length").items():
        means = {
            (method, rate): mean_interval(*(list(values.values()) for values in _scores(cell, "task").values()))
            for method, rate, cell in _cells(part, arguments, "compression")
        }
        level = next((mean for (method, _), mean in means.items() if method == FULL), None)
        lines = _lines({cell: mean for cell, mean in means.items() if cell[0] != FULL}, arguments)
        if lines:
            panels.append(Panel(f"{length} tokens", lines, level))
    return panels


def _lines(points: Mapping[tuple[str, Any], Estimate], arguments: Mapping[str, Any]) -> list[Line]:
    """(method, x) -> estimate as one line per method."""
    lines = []
    for label in arguments["methods"]:
        some = sorted((x, estimate) for (method, x), estimate in points.items() if method == label)
        if some:
            lines.append(Line(label, [x for x, _ in some], [estimate for _, estimate in some]))
    return lines


# -- fidelity


def _fidelity(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
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
    for method, _, part in _cells(rows, arguments, "entries"):
        if method == FULL and prefill == "dense":
            continue  # it is what all are compared with
        entries, divergence = part[0]["entries"], mean_interval([row["kl"] for row in part])
        if method != FULL:
            kl[method, entries] = divergence
        ratio = mean_interval([row["nll"] - row["full_nll"] for row in part])
        errors = [_mean(row["error"]) for row in part if row["error"] is not None]
        lines.append(
            [
                method,
                str(entries),
                f"{_mean(row['kept'] for row in part):.0f}",
                divergence.show(4),
                mean_interval([row["top1"] for row in part]).show(),
                Estimate(math.exp(ratio.mean), math.exp(ratio.low), math.exp(ratio.high), ratio.n).show(),
                mean_interval(errors).show() if errors else "positions renumbered",
                str(len(part)),
            ]
        )
    columns = ["method", "budget", "kept", "KL, nats/token", "top-1 agreement", "perplexity ratio", "layer error", "n"]
    caption = f"The full cache's next-token distribution, and what is left of it after {arguments['context']} tokens"
    caption += "" if prefill == "dense" else f" read by {prefill}"
    made: list[Part] = [Table(f"{caption} (means over windows, 95 % intervals)", columns, lines)]
    series = _lines({cell: estimate for cell, estimate in kl.items() if estimate.mean > 0}, arguments)
    if series:
        made.append(
            Drawing(
                "KL divergence from the full cache by entries per KV head. Bars are 95 % intervals over windows.",
                partial(
                    line_panels,
                    [Panel("", series)],
                    arguments["methods"][1:],
                    "entries per KV head",
                    "KL, nats/token",
                    log_x=True,
                    log_y=True,
                ),
            )
        )
    panels = _layer_panels(rows, arguments)
    if panels:
        made.append(
            Drawing(
                "Relative error of each layer's attention output, by budget.",
                partial(line_panels, panels, arguments["methods"][1:], "layer", "relative error", log_y=True),
            )
        )
    return made


def _oracle_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    lines = []
    for method, _, part in _cells(rows, arguments, "entries"):
        columns = ("error", "window", "future", "overlap")
        shown = [mean_interval([_mean(row[name]) for row in part]).show() for name in columns]
        lines.append(
            [method, str(part[0]["entries"]), f"{_mean(row['kept'] for row in part):.0f}", *shown, str(len(part))]
        )
    heads = ["method", "budget", "kept", "its set", "window oracle", "future oracle", "shared with the future's", "n"]
    context = arguments["oracle_context"]
    caption = f"Oracle gap at {context} tokens: relative error of attention outputs over the tail, mean over layers"
    panels = _layer_panels(rows, arguments, ("window", "future"))
    return [
        Table(caption, heads, lines),
        Drawing(
            "Oracle gap layer by layer: each method's set, and what greedy elimination keeps when judged by the prompt's last "
            "queries (window oracle) or by those to come (future oracle).",
            partial(line_panels, panels, arguments["methods"][1:], "layer", "relative error", log_y=True),
        ),
    ]


def _layer_panels(rows: Sequence[Row], arguments: Mapping[str, Any], bounds: Sequence[str] = ()) -> list[Panel]:
    """One panel per budget: error by layer; oracles are drawn as they are beside the first method."""
    panels: dict[int, dict[str, Line]] = {}
    for method, entries, part in _cells(rows, arguments, "entries"):
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


def _mean(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / len(some)

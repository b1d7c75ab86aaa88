"""Tables and figures of fidelity: distances to the full cache, and the oracle gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.figures import Line, Panel
from bench.report.stats import exp, grouped, mean_interval
from bench.report.tables import FULL, Column, Part, Row, Table, by_cell, cell_table, drawing, method_lines, plain_mean

# Whose errors the oracle gap compares: the field of a row, and what it is called.
SETS = (("error", "its set"), ("window_error", "window oracle"), ("future_error", "future oracle"))


def fidelity_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    by_part = {part: some for (part,), some in grouped(rows, "part").items()}
    made: list[Part] = []
    if text := by_part.get("text"):
        made += _text_parts(arguments, text)
    if oracle := [row for row in by_part.get("oracle", ()) if row["error"] is not None]:
        made += _oracle_parts(arguments, oracle)
    return made


def _mean_of(name: str, digits: int = 3) -> Column:
    return lambda part: mean_interval([row[name] for row in part]).show(digits)


def _layer_mean(name: str) -> Column:
    """Of a field with a number for each layer."""

    def mean(part: Sequence[Row]) -> str:
        means = [plain_mean(row[name]) for row in part if row[name] is not None]
        return str(mean_interval(means)) if means else "positions renumbered"

    return mean


def _ratio(part: Sequence[Row]) -> str:
    return str(mean_interval([row["nll"] - row["full_nll"] for row in part]).through(exp))


def _text_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    prefill = arguments.get("prefill", "dense")  # runs from before there was a choice were dense
    cells = by_cell(rows, arguments, "entries")
    if prefill == "dense":  # the full cache is what all are compared with
        cells = [cell for cell in cells if cell[0] != FULL]
    columns = {
        "KL, nats/token": _mean_of("kl", 4),
        "top-1 agreement": _mean_of("top1"),
        "perplexity ratio": _ratio,
    }
    errors = arguments.get("layer_errors", True)  # runs from before there was a choice have them
    if errors:
        columns["layer error"] = _layer_mean("error")
    caption = f"The full cache's next-token distribution, and what is left of it after {arguments['context']} tokens"
    caption += "" if prefill == "dense" else f" read by {prefill}"
    shown = [(method, str(entries or arguments["context"]), part) for method, entries, part in cells]
    kl = {
        (method, entries): mean_interval([row["kl"] for row in part])
        for method, entries, part in cells
        if method != FULL
    }
    series = method_lines({cell: estimate for cell, estimate in kl.items() if estimate.mean > 0}, arguments)
    return [
        cell_table(f"{caption} (means over windows, 95 % intervals)", shown, columns, "budget"),
        *drawing(
            "KL divergence from the full cache by entries per KV head. Bars are 95 % intervals over windows.",
            [Panel("", series)],
            arguments,
            "entries per KV head",
            "KL, nats/token",
            log_y=True,
        ),
        *_by_layer(
            "Relative error of each layer's attention output, by budget.",
            _layer_panels(rows, arguments) if errors else [],
            arguments,
        ),
    ]


def _oracle_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    columns = {title: _layer_mean(name) for name, title in (*SETS, ("overlap", "shared with the future's"))}
    context = arguments["oracle_context"]
    caption = f"Oracle gap at {context} tokens: relative error of attention outputs over the tail, mean over layers"
    shown = [(method, str(entries), part) for method, entries, part in by_cell(rows, arguments, "entries")]
    return [
        cell_table(caption, shown, columns, "budget"),
        _oracle_by_layer(arguments, rows),
        *_by_layer(
            "Oracle gap layer by layer: each method's set, and what greedy elimination keeps when judged by the prompt's last "
            "queries (window oracle) or by those to come (future oracle).",
            _layer_panels(rows, arguments, SETS[1:]),
            arguments,
        ),
    ]


def _by_layer(caption: str, panels: Sequence[Panel], arguments: Mapping[str, Any]) -> list[Part]:
    return drawing(caption, panels, arguments, "layer", "relative error", log_x=False, log_y=True)


def _oracle_by_layer(arguments: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """The figure's numbers: a line for every set, a column for every layer."""
    lines = []
    for method, _, part in by_cell(rows, arguments, "entries"):
        for name, title in SETS:
            layers = zip(*(row[name] for row in part), strict=True)
            lines.append([method, str(part[0]["entries"]), title, *(f"{plain_mean(layer):.3f}" for layer in layers)])
    heads = ["method", "budget", "set", *(f"layer {index}" for index in range(len(rows[0]["error"])))]
    return Table(
        f"Oracle gap at {arguments['oracle_context']} tokens, layer by layer (means over windows)", heads, lines
    )


def _layer_panels(
    rows: Sequence[Row], arguments: Mapping[str, Any], bounds: Sequence[tuple[str, str]] = ()
) -> list[Panel]:
    """One panel per budget: error by layer; oracles are drawn as they are beside the first method."""
    panels: dict[int, dict[str, Line]] = {}
    for method, entries, part in by_cell(rows, arguments, "entries"):
        known = [row for row in part if row["error"] is not None]
        if method == FULL or not known:
            continue
        lines = panels.setdefault(entries, {})
        for name, title in bounds:
            lines.setdefault(name, _layer_line(title, known, name, bound=True))
        lines[method] = _layer_line(method, known, "error")
    return [Panel(f"{entries} entries", list(lines.values())) for entries, lines in sorted(panels.items())]


def _layer_line(label: str, rows: Sequence[Row], name: str, bound: bool = False) -> Line:
    layers = list(zip(*(row[name] for row in rows), strict=True))
    return Line(label, range(len(layers)), [mean_interval(layer) for layer in layers], bound)

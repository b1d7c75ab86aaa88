"""Tables and figures of fidelity: distances to the full cache, and the oracle gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.figures import Line, Panel
from bench.report.stats import exp, grouped, mean_interval
from bench.report.tables import FULL, Part, Row, Table, by_cell, drawing, method_lines, plain_mean

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


def _text_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    lines, kl = [], {}
    prefill = arguments.get("prefill", "dense")  # runs from before there was a choice were dense
    for method, _, part in by_cell(rows, arguments, "entries"):
        if method == FULL and prefill == "dense":
            continue  # it is what all are compared with
        entries, divergence = part[0]["entries"] or arguments["context"], mean_interval([row["kl"] for row in part])
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
        columns = ("error", "window_error", "future_error", "overlap")
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
            _layer_panels(rows, arguments, SETS[1:]),
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
            lines.setdefault(name, _by_layer(title, known, name, bound=True))
        lines[method] = _by_layer(method, known, "error")
    return [Panel(f"{entries} entries", list(lines.values())) for entries, lines in sorted(panels.items())]


def _by_layer(label: str, rows: Sequence[Row], name: str, bound: bool = False) -> Line:
    layers = list(zip(*(row[name] for row in rows), strict=True))
    return Line(label, range(len(layers)), [mean_interval(layer) for layer in layers], bound)

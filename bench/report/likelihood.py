"""Tables and figures of runs in which nothing is generated: anli, perplexity, smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.report.stats import Estimate, exp, grouped, mean_interval, paired_difference, ratio_interval
from bench.report.tables import (
    FULL,
    QUESTION,
    Part,
    Row,
    Table,
    accuracies,
    accuracy,
    accuracy_table,
    by_cell,
    drawing,
    panel,
    plain_mean,
    scores_of,
)

UNITS = {"token": "tokens", "word": "words", "byte": "text_bytes"}


# -- accuracy


def anli_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    parts = grouped(rows, "question")
    for (mode,), part in parts.items():
        made.append(accuracy_table(f"Accuracy, {QUESTION[mode]}", "task", part, arguments))
        if len(arguments["tasks"]) > 1:
            made.append(_by_round(f"By round, {QUESTION[mode]}", part, arguments))
    panels = [panel(f"query-{mode}", accuracies(part, arguments), arguments) for (mode,), part in parts.items()]
    return made + drawing(
        "Accuracy against what is kept of the prompt. Mean over rounds; bars are 95 % intervals; guessing is right in a "
        "third of all cases.",
        panels,
        arguments,
        "share or entries kept",
        "accuracy",
    )


def _by_round(caption: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Every round's accuracy and its difference to the full cache, sample by sample, each with its interval."""
    rounds = [task for task in arguments["tasks"] if any(row["task"] == task for row in rows)]
    full = scores_of([row for row in rows if row["method"] == FULL], "task")
    lines = []
    for method, asked, part in by_cell(rows, arguments):
        scores = scores_of(part, "task")
        line = [method, f"{asked:g}"]
        for task in rounds:
            ours = scores.get(task, {})
            difference = None if method == FULL else paired_difference((ours, full.get(task, {})))
            line.append(mean_interval(list(ours.values())).show() if ours else "")
            line.append(difference.show(sign="+") if difference else "")
        lines.append(line)
    heads = [head for task in rounds for head in (f"{task} [95 %]", f"{task} minus full [95 %]")]
    return Table(caption, ["method", "at", *heads], lines)


# -- perplexity


def _perplexity(rows: Sequence[Row], unit: str = "token") -> Estimate:
    return ratio_interval([row["nll"] for row in rows], [row[UNITS[unit]] for row in rows]).through(exp)


def _nats(rows: Sequence[Row]) -> dict[Any, float]:
    """Window -> negative log-likelihood, nats per token."""
    return {row["window"]: row["nll"] / row["tokens"] for row in rows}


def perplexity_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    protocol, count = arguments["protocol"], len({row["window"] for row in rows})
    read = {
        "streaming": "token by token, evicting after each",
        "prefill": f"after {arguments['context']} tokens, which were evicted",
        "chunked": f"in chunks of {arguments['chunk']} tokens, evicting after each",
    }
    full = _nats([row for row in rows if row["method"] == FULL])
    lines, means = [], {}
    for method, asked, part in by_cell(rows, arguments):
        means[method, asked] = _perplexity(part)
        ratio = paired_difference((_nats(part), full)) if method != FULL else None
        lines.append(
            [
                method,
                f"{asked:g}",
                f"{plain_mean(row['kept'] for row in part):.0f}",
                *(_perplexity(part, unit).show() for unit in UNITS),
                ratio.through(exp).show() if ratio else "",
                str(len(part)),
            ]
        )
    columns = ["method", "at", "kept", *(f"per {unit} [95 %]" for unit in UNITS), "over full [95 %]", "n"]
    caption = f"Perplexity ({protocol}): {arguments['tokens']} tokens of each of {count} windows, read {read[protocol]}"
    return [
        Table(caption, columns, lines),
        *drawing(
            "Perplexity per token by what is kept. Bars are 95 % intervals over windows.",
            [panel(protocol, means, arguments)],
            arguments,
            "share or entries kept",
            "perplexity",
            log_y=True,
        ),
    ]


# -- smoothing

Values = Callable[[Sequence[Row]], dict[Any, dict[Any, float]]]  # one cell's rows: group -> sample -> value


def smoothing_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """The verdict first, then the differences it comes from, then the levels."""
    text = [row for row in rows if row["part"] == "perplexity"]
    choices = grouped([row for row in rows if row["part"] == "choice"], "question")
    # (name, rows, values of a cell, whether more is better, the cell's level)
    measures: list[tuple[str, Sequence[Row], Values, bool, Callable[[Sequence[Row]], Estimate]]] = []
    if text:
        measures.append(("perplexity", text, _by_text, False, _perplexity))
    for (mode,), chosen in choices.items():
        measures.append((f"accuracy, query-{mode}", chosen, partial(scores_of, by="task"), True, accuracy))
    verdicts: list[list[str]] = []
    differences: list[Part] = []
    levels: list[Part] = []
    for name, some, values, rising, level in measures:
        found = _differences(some, arguments, values)
        verdicts += _verdicts(name, found, arguments, rising)
        unit = "nats per token, less is better" if name == "perplexity" else "share of right answers, more is better"
        caption = f"{arguments['methods'][1]} minus the others, {name} ({unit}; paired, 95 % intervals)"
        differences.append(_by_rate(caption, found, arguments, lambda e: e.show(sign="+")))
        cells = {(m, at): level(part) for m, at, part in by_cell(some, arguments)}
        whole = next((f"{one}, n = {one.n}" for (method, _), one in cells.items() if method == FULL), "not run yet")
        title = f"{name[0].upper()}{name[1:]}"
        levels.append(_by_rate(f"{title} by compression (full cache: {whole})", cells, arguments, str))
        levels += drawing(
            f"{title} against compression. Bars are 95 % intervals; the grey line is the full cache.",
            [panel("", cells, arguments)],
            arguments,
            "compression",
            name.split(",")[0],
            log_y=name == "perplexity",
        )
    heads = ["measure", f"{arguments['methods'][1]} against", "better at", "worse at", "undecided at"]
    caption = "Where the 95 % interval of the paired difference leaves zero out, and on which side"
    return [Table(caption, heads, verdicts), *differences, *levels]


def _by_text(rows: Sequence[Row]) -> dict[Any, dict[Any, float]]:
    return {"text": _nats(rows)}


def _differences(rows: Sequence[Row], arguments: Mapping[str, Any], values: Values) -> dict[tuple[str, Any], Estimate]:
    """(other method, compression) -> the subject's value minus the other's; the full cache is not among the others."""
    subject = arguments["methods"][1]
    cells = {(method, asked): values(part) for method, asked, part in by_cell(rows, arguments)}
    found = {}
    for (method, asked), theirs in cells.items():
        ours = cells.get((subject, asked))
        if ours is None or method in (subject, FULL):
            continue
        difference = paired_difference(*((ours[group], theirs[group]) for group in ours if group in theirs))
        if difference is not None:
            found[method, asked] = difference
    return found


def _verdicts(
    name: str, found: Mapping[tuple[str, Any], Estimate], arguments: Mapping[str, Any], rising: bool
) -> list[list[str]]:
    lines = []
    for method in arguments["methods"][2:]:
        sides: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for (other, asked), difference in found.items():
            if other == method:
                above, below = difference.low > 0, difference.high < 0
                side = "undecided" if not (above or below) else "better" if above == rising else "worse"
                sides[side].append(f"{asked:g}x")
        if any(sides.values()):
            lines.append([name, method, *(", ".join(rates) or "-" for rates in sides.values())])
    return lines


def _by_rate(
    caption: str,
    cells: Mapping[tuple[str, Any], Estimate],
    arguments: Mapping[str, Any],
    show: Callable[[Estimate], str],
) -> Table:
    """A line per method, a column per compression."""
    rates = arguments["compression"]
    methods = [m for m in arguments["methods"] if m != FULL and any(method == m for method, _ in cells)]
    lines = [
        [method, *(show(cells[method, rate]) if (method, rate) in cells else "" for rate in rates)]
        for method in methods
    ]
    return Table(caption, ["method", *(f"{rate:g}x" for rate in rates)], lines)

"""Tables and figures of runs in which nothing is generated: anli, perplexity, smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import tables
from bench.report.stats import Estimate, Values, exp, grouped, mean_interval, paired_difference, ratio_interval
from bench.report.tables import FULL, Column, Part, Row, Table

SUBJECT_OF_EACH = "the first under each probe"
UNITS = {"token": "tokens", "word": "words", "byte": "text_bytes"}


# -- accuracy


def anli_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    made: list[Part] = []
    parts = grouped(rows, "question")
    for (mode,), part in parts.items():
        made.append(tables.accuracy_table(f"Accuracy, {tables.QUESTION[mode]}", "task", part, arguments))
        if _has_likelihood(part):
            made.append(_likelihood_table(f"Likelihood of the right answer, {tables.QUESTION[mode]}", part, arguments))
        if len(arguments["tasks"]) > 1:
            made.append(_by_round(f"By round, {tables.QUESTION[mode]}", part, arguments))
    panels = [
        tables.panel(f"query-{mode}", tables.accuracies(part, arguments), arguments) for (mode,), part in parts.items()
    ]
    return made + tables.drawing(
        "Accuracy against what is kept of the prompt. Mean over rounds; bars are 95 % intervals; guessing is right in a "
        "third of all cases.",
        panels,
        arguments,
        "share or entries kept",
        "accuracy",
    )


def _likelihood_table(caption: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Its share among the answers offered, a mean over rounds; the difference to the full cache is taken sample by sample."""
    columns: dict[str, Column] = {
        "mean [95 %]": lambda part: str(_mean_share(part)),
        "minus full [95 %]": lambda part: tables.signed(tables.minus_full(part, rows, _shares)),
    }
    cells = [(method, f"{asked:g}", part) for method, asked, part in tables.by_cell(rows, arguments)]
    return tables.cell_table(caption, cells, columns)


def _by_round(caption: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Every round's accuracy and its difference to the full cache, sample by sample, each with its interval."""
    rounds = [task for task in arguments["tasks"] if any(row["task"] == task for row in rows)]
    lines = []
    for method, asked, part in tables.by_cell(rows, arguments):
        line = [method, f"{asked:g}"]
        for task in rounds:
            some = [row for row in part if row["task"] == task]
            line.append(str(_accuracy(some)) if some else "")
            line.append(tables.signed(tables.minus_full(some, rows, _by_task)) if some else "")
        lines.append(line)
    heads = [head for task in rounds for head in (f"{task} [95 %]", f"{task} minus full [95 %]")]
    return Table(caption, ["method", "at", *heads], lines)


# -- perplexity


def _perplexity(rows: Sequence[Row], unit: str = "token") -> Estimate:
    return ratio_interval([row["nll"] for row in rows], [row[UNITS[unit]] for row in rows]).through(exp)


def _nats(rows: Sequence[Row]) -> Values:
    """Window -> negative log-likelihood, nats per token; all in one group."""
    return {"text": {row["window"]: row["nll"] / row["tokens"] for row in rows}}


def perplexity_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    protocol, count = arguments["protocol"], len({row["window"] for row in rows})
    read = {
        "streaming": "token by token, evicting after each",
        "prefill": f"after {arguments['context']} tokens, which were evicted",
        "chunked": f"in chunks of {arguments['chunk']} tokens, evicting after each",
    }

    def per(unit: str) -> Column:
        return lambda part: str(_perplexity(part, unit))

    def over_full(part: Sequence[Row]) -> str:
        ratio = tables.minus_full(part, rows, _nats)
        return str(ratio.through(exp)) if ratio else ""

    cells = tables.by_cell(rows, arguments)
    columns = {f"per {unit} [95 %]": per(unit) for unit in UNITS} | {"over full [95 %]": over_full}
    caption = f"Perplexity ({protocol}): {arguments['tokens']} tokens of each of {count} windows, read {read[protocol]}"
    means = {(method, asked): _perplexity(part) for method, asked, part in cells}
    return [
        tables.cell_table(caption, [(method, f"{asked:g}", part) for method, asked, part in cells], columns),
        *tables.drawing(
            "Perplexity per token by what is kept. Bars are 95 % intervals over windows.",
            [tables.panel(protocol, means, arguments)],
            arguments,
            "share or entries kept",
            "perplexity",
            log_y=True,
        ),
    ]


# -- smoothing


@dataclass(frozen=True)
class Measure:
    """What a part of the rows is judged by.

    Attributes:
        values: of a cell's rows; rising: whether more of them is better.
        level: what a cell's rows come to.
    """

    name: str
    unit: str
    rows: Sequence[Row]
    values: Callable[[Sequence[Row]], Values]
    rising: bool
    level: Callable[[Sequence[Row]], Estimate]


def smoothing_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """The verdict first, then the differences it comes from, then the levels."""
    text = [row for row in rows if row["part"] == "perplexity"]
    choices = grouped([row for row in rows if row["part"] == "choice"], "question")
    measures = [Measure("perplexity", "nats per token, less", text, _nats, False, _perplexity)] if text else []
    for (mode,), some in choices.items():
        name = f"accuracy, query-{mode}"
        measures.append(Measure(name, "share of right answers, more", some, _by_task, True, _accuracy))
        if _has_likelihood(some):
            name = f"likelihood of the right answer, query-{mode}"
            measures.append(Measure(name, "its share among those offered, more", some, _shares, True, _mean_share))
    arms = arguments.get("arms") or {
        "window": arguments["methods"][1:]
    }  # runs from before there was a choice of probes
    verdicts: list[list[str]] = []
    differences: list[Part] = []
    levels: list[Part] = []
    for measure in measures:
        cells = tables.by_cell(measure.rows, arguments)
        values = {(method, asked): measure.values(part) for method, asked, part in cells}
        level = {(method, asked): measure.level(part) for method, asked, part in cells}
        for probe, labels in arms.items():
            subject, *others = labels
            found = _differences(subject, others, values)
            place = [measure.name, probe] if len(arms) > 1 else [measure.name]
            verdicts += [[*place, *line] for line in _verdicts(measure, others, found)]
            caption = f"{subject} minus the others, {measure.name} ({measure.unit} is better; paired, 95 % intervals)"
            differences.append(tables.rate_table(caption, found, arguments, tables.signed))
        full = level.get((FULL, 1.0))
        title = f"{measure.name[0].upper()}{measure.name[1:]}"
        whole = f"{full}, n = {full.n}" if full else "not run yet"
        evicting = {cell: one for cell, one in level.items() if cell[0] != FULL}
        levels.append(tables.rate_table(f"{title} by compression (full cache: {whole})", evicting, arguments))
        levels += tables.drawing(
            f"{title} against compression. Bars are 95 % intervals; the grey line is the full cache.",
            [
                tables.panel(
                    probe if len(arms) > 1 else "",
                    {cell: one for cell, one in level.items() if cell[0] in (FULL, *labels)},
                    arguments,
                )
                for probe, labels in arms.items()
            ],
            arguments,
            "compression",
            measure.name.split(",")[0],
            log_y=measure.name == "perplexity",
        )
    subjects = [labels[0] for labels in arms.values()]
    heads = (
        ["measure", "probe", f"{SUBJECT_OF_EACH} against"] if len(arms) > 1 else ["measure", f"{subjects[0]} against"]
    )
    caption = "Where the 95 % interval of the paired difference leaves zero out, and on which side"
    if len(arms) > 1:
        caption += f" ({SUBJECT_OF_EACH}: {', '.join(subjects)})"
    return [Table(caption, [*heads, "better at", "worse at", "undecided at"], verdicts), *differences, *levels]


def _has_likelihood(rows: Sequence[Row]) -> bool:
    """Rows of earlier versions have none."""
    return bool(rows) and all("likelihood" in row for row in rows)


def _shares(rows: Sequence[Row]) -> Values:
    return tables.scores_of(rows, "task", of="likelihood")


def _mean_share(rows: Sequence[Row]) -> Estimate:
    return mean_interval(*(list(values.values()) for values in _shares(rows).values()))


def _by_task(rows: Sequence[Row]) -> Values:
    return tables.scores_of(rows, "task")


def _accuracy(rows: Sequence[Row]) -> Estimate:
    return tables.accuracy(rows, "task")


def _differences(
    subject: str, others: Sequence[str], cells: Mapping[tuple[str, Any], Values]
) -> dict[tuple[str, Any], Estimate]:
    """(other method, compression) -> the subject's value minus the other's."""
    found = {}
    for (method, asked), theirs in cells.items():
        if method in others and (subject, asked) in cells:
            difference = paired_difference(cells[subject, asked], theirs)
            if difference is not None:
                found[method, asked] = difference
    return found


def _verdicts(measure: Measure, others: Sequence[str], found: Mapping[tuple[str, Any], Estimate]) -> list[list[str]]:
    lines = []
    for method in others:
        sides: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for (other, asked), difference in found.items():
            if other == method:
                above, below = difference.low > 0, difference.high < 0
                side = "undecided" if not (above or below) else "better" if above == measure.rising else "worse"
                sides[side].append(f"{asked:g}x")
        if any(sides.values()):
            lines.append([method, *(", ".join(rates) or "-" for rates in sides.values())])
    return lines

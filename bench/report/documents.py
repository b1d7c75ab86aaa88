"""Tables and figures of documents with many questions: what answers lose, by method and compression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.report import tables
from bench.report.stats import Estimate, Values, grouped, mean_interval, paired_difference
from bench.report.tables import FULL, Column, Part, Row

ANSWERS = {"gold": "the right answers", "own": "the full cache's own answers"}


def documents_parts(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """KL by method and compression first, then what it comes from, then differences and the figure."""
    made: list[Part] = []
    for (mode, score), part in grouped(rows, "question", "part").items():
        made += _parts(f"{ANSWERS[arguments['answer']]}, {tables.QUESTION[mode]}", score == "letters", arguments, part)
    return made


def _parts(what: str, letters: bool, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    cells = tables.by_cell(rows, arguments)
    documents = len({row["document"] for row in rows})
    kl = {(method, at): _mean(part, "kl") for method, at, part in cells}
    evicting = {cell: estimate for cell, estimate in kl.items() if cell[0] != FULL}
    columns: dict[str, Column] = {
        "share": lambda part: f"{tables.plain_mean(row['kept'] / row['tokens'] for row in part):.3f}",
        "KL, nats/token [95 %]": lambda part: _mean(part, "kl").show(4),
        "top-1 agreement": lambda part: f"{_mean(part, 'top1').mean:.3f}",
        "nll, nats/token": lambda part: f"{_mean(part, 'nll').mean:.3f}",
        "nll minus full [95 %]": lambda part: _minus_full(part, rows, "nll"),
    }
    if letters:
        columns |= {
            "accuracy [95 %]": lambda part: str(_mean(part, "score")),
            "minus full [95 %]": lambda part: _minus_full(part, rows, "score"),
        }
    made: list[Part] = []
    if evicting:
        caption = f"KL(full || method) of {what}: nats per token, means over questions [95 %]"
        made.append(tables.rate_table(caption, evicting, arguments, lambda one: one.show(4)))
    shown = [(method, f"{at:g}x", part) for method, at, part in cells]
    made.append(tables.cell_table(f"{documents} document{'s' * (documents > 1)}, {what}", shown, columns))
    subject = arguments["methods"][1] if len(arguments["methods"]) > 2 else None
    values = {(method, at): _values(part, "kl") for method, at, part in cells}
    differences = _differences(subject, values)
    if differences:
        caption = f"KL of {subject} minus that of the others, question by question [95 %]; less is better"
        made.append(tables.rate_table(caption, differences, arguments, lambda one: tables.signed(one, 4)))
    positive = {cell: estimate for cell, estimate in evicting.items() if estimate.low > 0}
    made += tables.drawing(
        f"KL divergence from the full cache against compression, {what}. Bars are 95 % intervals over questions.",
        [tables.panel("", positive, arguments)],
        arguments,
        "compression",
        "KL, nats/token",
        log_y=True,
    )
    if letters:
        accuracy = {(method, at): _mean(part, "score") for method, at, part in cells}
        made += tables.drawing(
            f"Right letters against compression, {what}. Bars are 95 % intervals over questions.",
            [tables.panel("", accuracy, arguments)],
            arguments,
            "compression",
            "accuracy",
        )
    return made


def _mean(rows: Sequence[Row], name: str) -> Estimate:
    return mean_interval([row[name] for row in rows])


def _values(rows: Sequence[Row], name: str) -> Values:
    """Question -> value, all in one group."""
    return {"all": {(row["document"], row["index"]): row[name] for row in rows}}


def _minus_full(part: Sequence[Row], rows: Sequence[Row], name: str) -> str:
    values: Callable[[Sequence[Row]], Values] = lambda some: _values(some, name)  # noqa: E731
    return tables.signed(tables.minus_full(part, rows, values))


def _differences(subject: str | None, values: Mapping[tuple[str, Any], Values]) -> dict[tuple[str, Any], Estimate]:
    """(other method, compression) -> the subject's value minus the other's, question by question."""
    found = {}
    for (method, at), theirs in values.items():
        ours = values.get((str(subject), at))
        if ours is not None and method not in (subject, FULL):
            difference = paired_difference(ours, theirs)
            if difference is not None:
                found[method, at] = difference
    return found

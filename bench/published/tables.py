"""Tables and figures of the published benchmarks: the paper's layout, intervals, and published figures beside ours.

Scores are times 100, as they are published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.report import tables
from bench.report.retrieval import needle_figure, needle_grids
from bench.report.stats import Estimate, Values, grouped
from bench.report.tables import FULL, Drawing, Part, Row, Table

TITLES = {
    "longbench": "LongBench",
    "ruler-official": "RULER",
    "needle-official": "Needle in a haystack (essays)",
    "infinitebench": "InfiniteBench",
}
BY_LENGTH = ("ruler-official", "needle-official")  # published as means by length


def published_parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and figures of a published benchmark's run."""
    made: list[Part] = []
    if kind in BY_LENGTH:
        made.append(_layout("Mean over tasks by length", "length", rows, arguments))
        if len(arguments["tasks"]) > 1:
            for (length,), some in grouped(rows, "length").items():
                made.append(_layout(f"{length} tokens by task", "task", some, arguments))
    else:
        made.append(_layout("By task", "task", rows, arguments))
    made += [_means(kind, arguments, rows), _asked(arguments, rows)]
    if kind == "needle-official":
        named = [{**row, "method": f"{row['method']} {_budget(row)}".strip()} for row in rows]
        made.append(Drawing("Score by depth and length; 1 is best.", partial(needle_figure, needle_grids(named))))
    if len({type(budget) for budget in arguments["budgets"]}) == 1:
        means = {(method, asked): _mean(part) for method, asked, part in tables.by_cell(rows, arguments)}
        caption = "Mean over tasks, x 100, against the budget. Bars are 95 % intervals."
        made += tables.drawing(caption, [tables.panel("", means, arguments)], arguments, "budget", "mean x 100")
    return made


def published(kind: str, arguments: Mapping[str, Any]) -> tuple[str, dict[tuple[Any, ...], float]]:
    """The model that the checkpoint's name and shape say it is, and its figures by (method, budget, length or None).

    Methods are named as `--methods` names them, without a preset; ReST-KV with options has a figure where the paper's ablations
    do. It is the paper's under one of its presets only: our own defaults are others.
    """
    name = _plain(arguments["checkpoint"])
    for entry in _published().get(kind, ()):
        if _plain(entry["model"]) == name and arguments["model"].startswith(entry["shape"] + "-"):
            figures = {(one["method"], one["budget"], one.get("length")): one["mean"] for one in entry["figures"]}
            return entry["model"], figures
    return "", {}


def _plain(name: str) -> str:
    """Without what checkpoints' folders have besides the model's name."""
    return re.sub("[^a-z0-9]", "", name.lower().removeprefix("meta-").removesuffix("-hf"))


@cache
def _published() -> Mapping[str, Any]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def _cells(rows: Sequence[Row], arguments: Mapping[str, Any]) -> list[tuple[str, Any, list[Row]]]:
    """See tables.by_cell; budgets in the order in which they were given, of whatever kinds."""
    budgets = arguments["budgets"]
    return sorted(tables.by_cell(rows, arguments), key=lambda cell: -1 if cell[0] == FULL else budgets.index(cell[1]))


def _budget(row: Row) -> str:
    asked = row["asked"]
    return "" if row["method"] == FULL else f"{asked:.0%}" if isinstance(asked, float) else str(asked)


def _layout(caption: str, by: str, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Table:
    """Method x budget x task (or length), and the plain mean of these; of a group that is not complete in all cells, too."""
    cells = _cells(rows, arguments)
    groups = list(dict.fromkeys(row[by] for _, _, part in cells for row in part))
    lines = []
    for method, _, part in cells:
        means = {group: 100 * _group_mean(some) for (group,), some in grouped(part, by).items()}
        shown = [f"{means[group]:.2f}" if group in means else "" for group in groups]
        lines.append([method, _budget(part[0]), *shown, f"{tables.plain_mean(means.values()):.2f}"])
    return Table(f"{caption}, x 100", ["method", "budget", *map(str, groups), "mean"], lines)


def _group_mean(rows: Sequence[Row]) -> float:
    """Plain mean over tasks of the means over their items."""
    return tables.plain_mean(tables.plain_mean(row["score"] for row in some) for some in grouped(rows, "task").values())


def _scores(rows: Sequence[Row]) -> Values:
    return tables.scores_of(rows, "task", "length")


def _mean(rows: Sequence[Row]) -> Estimate:
    return tables.accuracy(rows, "task", "length").through(_percent)


def _percent(share: float) -> float:
    return 100 * share


def _means(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """Means with intervals, differences to the full cache item by item, what was kept, and what is published."""
    model, figures = published(kind, arguments)
    cells = _cells(rows, arguments)

    def minus(part: Sequence[Row]) -> str:
        difference = tables.minus_full(part, rows, _scores)
        return tables.signed(difference and difference.through(_percent), 2)

    columns = {"mean [95 %]": lambda part: _mean(part).show(2), "minus full [95 %]": minus}
    caption = f"Means over tasks, x 100, protocol {arguments['protocol']}"
    table = tables.cell_table(
        caption, [(method, _budget(part[0]), part) for method, _, part in cells], columns, "budget"
    )
    if not model:
        return table
    lines = []
    for line, (_, _, part) in zip(table.lines, cells, strict=True):
        theirs = _theirs(part, figures)
        beside = ["", ""] if theirs is None else [f"{theirs:.2f}", f"{_mean(part).mean - theirs:+.2f}"]
        lines.append([*line, *beside])
    caption += f"; published for {model}: of all tasks and items, with the released wording and its own options"
    return Table(caption, [*table.columns, "published", "ours minus published"], lines)


def _theirs(rows: Sequence[Row], figures: Mapping[tuple[Any, ...], float]) -> float | None:
    """The published mean of what a cell's rows are of, over the lengths they have; None where one is not published."""
    method = rows[0]["method"]
    if method.split(":")[0] == "restkv":
        return None
    name, budget = re.sub("@[^:]*", "", method), None if method == FULL else rows[0]["asked"]
    known = [figures.get((name, budget, length)) for length in {row["length"] for row in rows}]
    return None if None in known else tables.plain_mean(known)  # type: ignore[arg-type]


def _asked(arguments: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """How each task was asked: wording, chat template, tokens, prompts that lost their middle."""
    lines = []
    for (task,), some in grouped(rows, "task").items():
        prompts = {(row["length"], row["depth"], row["index"]): row for row in some}.values()
        tokens = [row["tokens"] for row in prompts]
        lines.append(
            [
                task,
                ", ".join(sorted({row["wording"] for row in prompts})),
                "yes" if any(row["chat"] for row in prompts) else "no",
                f"{tables.plain_mean(tokens):.0f}",
                str(max(tokens)),
                str(sum(row["cut"] > 0 for row in prompts)),
                str(len(prompts)),
            ]
        )
    heads = ["task", "wording of the prompt", "chat template", "mean tokens", "most", "lost their middle", "prompts"]
    return Table(f"How it was asked (longest prompt: {arguments['max_length'] or 'any'} tokens)", heads, lines)

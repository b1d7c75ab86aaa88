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

from bench.report.figures import Line, Panel, line_panels
from bench.report.retrieval import needle_figure, needle_grids
from bench.report.stats import Estimate, grouped, mean_interval, paired_difference
from bench.report.tables import FULL, Drawing, Part, Row, Table

TITLES = {
    "longbench": "LongBench",
    "ruler-official": "RULER",
    "needle-official": "Needle in a haystack (essays)",
    "infinitebench": "InfiniteBench",
}
BY_LENGTH = ("ruler-official", "needle-official")  # published as means by length
MethodAt = tuple[str, int | float | None]  # a method and the budget asked for; the full cache has none


def published_parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and figures of a published benchmark's run."""
    cells = _cells(rows, arguments)
    made: list[Part] = []
    if kind in BY_LENGTH:
        made.append(_layout("Mean over tasks by length", "length", cells))
        if len(arguments["tasks"]) > 1:
            for (length,), some in grouped(rows, "length").items():
                made.append(_layout(f"{length} tokens by task", "task", _cells(some, arguments)))
    else:
        made.append(_layout("By task", "task", cells))
    made += [_means(kind, arguments, cells), _asked(arguments, rows)]
    if kind == "needle-official":
        named = [{**row, "method": _name(_cell(row))} for row in rows]
        made.append(Drawing("Score by depth and length; 1 is best.", partial(needle_figure, needle_grids(named))))
    if figure := _figure(arguments, cells):
        made.append(figure)
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


def _cells(rows: Sequence[Row], arguments: Mapping[str, Any]) -> dict[MethodAt, list[Row]]:
    """The full cache first, then budget by budget; methods in the order of the arguments."""
    methods, budgets = arguments["methods"], [None, *arguments["budgets"]]
    cells = {_cell(part[0]): part for part in grouped(rows, "method", "asked").values()}
    return {key: cells[key] for key in sorted(cells, key=lambda key: (budgets.index(key[1]), methods.index(key[0])))}


def _cell(row: Row) -> MethodAt:
    return row["method"], None if row["method"] == FULL else row["asked"]


def _name(cell: MethodAt) -> str:
    method, budget = cell
    return method if budget is None else f"{method} {budget:g}"


def _budget(budget: int | float | None) -> str:
    return "" if budget is None else f"{budget:.0%}" if isinstance(budget, float) else str(budget)


def _layout(caption: str, by: str, cells: Mapping[MethodAt, Sequence[Row]]) -> Table:
    """Method x budget x task (or length), and the plain mean of these; of a group that is not complete in all cells, too."""
    groups = list(dict.fromkeys(row[by] for part in cells.values() for row in part))
    lines = []
    for (method, budget), part in cells.items():
        means = {group: 100 * _group_mean(some) for (group,), some in grouped(part, by).items()}
        shown = [f"{means[group]:.2f}" if group in means else "" for group in groups]
        lines.append([method, _budget(budget), *shown, f"{sum(means.values()) / len(means):.2f}"])
    return Table(f"{caption}, x 100", ["method", "budget", *map(str, groups), "mean"], lines)


def _group_mean(rows: Sequence[Row]) -> float:
    """Plain mean over tasks of the means over their items."""
    means = [sum(row["score"] for row in some) / len(some) for some in grouped(rows, "task").values()]
    return sum(means) / len(means)


def _scores(rows: Sequence[Row]) -> dict[Any, dict[Any, float]]:
    """(task, length) -> item -> score, times 100."""
    return {
        place: {(row["depth"], row["index"]): 100 * row["score"] for row in some}
        for place, some in grouped(rows, "task", "length").items()
    }


def _means(kind: str, arguments: Mapping[str, Any], cells: Mapping[MethodAt, Sequence[Row]]) -> Table:
    """Means with intervals, differences to the full cache item by item, what was kept, and what is published."""
    model, figures = published(kind, arguments)
    full = _scores(cells.get((FULL, None), []))
    lines = []
    for (method, budget), part in cells.items():
        scores = _scores(part)
        mean = mean_interval(*(list(values.values()) for values in scores.values()))
        pairs = [(scores[place], full[place]) for place in scores if place in full]
        difference = None if method == FULL else paired_difference(*pairs)
        line = [method, _budget(budget), f"{sum(row['kept'] for row in part) / len(part):.0f}", mean.show(2)]
        line += [difference.show(2, sign="+") if difference else "", str(mean.n)]
        if model:
            theirs = _theirs(method, budget, part, figures)
            line += [f"{theirs:.2f}", f"{mean.mean - theirs:+.2f}"] if theirs is not None else ["", ""]
        lines.append(line)
    heads = ["method", "budget", "kept", "mean [95 %]", "minus full [95 %]", "n"]
    caption = f"Means over tasks, x 100, protocol {arguments['protocol']}"
    if model:
        heads += ["published", "ours minus published"]
        caption += f"; published for {model}: of all tasks and items, with the released wording and its own options"
    return Table(caption, heads, lines)


def _theirs(
    method: str, budget: int | float | None, rows: Sequence[Row], figures: Mapping[tuple[Any, ...], float]
) -> float | None:
    """The published mean of what the rows are of, over the lengths they have; None where one is not published."""
    if method.split(":")[0] == "restkv":
        return None
    name = re.sub("@[^:]*", "", method)
    lengths = {row["length"] for row in rows}
    known = [figures.get((name, budget, length)) for length in lengths]
    return None if None in known else sum(known) / len(known)  # type: ignore[arg-type]


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
                f"{sum(tokens) / len(tokens):.0f}",
                str(max(tokens)),
                str(sum(row["cut"] > 0 for row in prompts)),
                str(len(prompts)),
            ]
        )
    heads = ["task", "wording of the prompt", "chat template", "mean tokens", "most", "lost their middle", "prompts"]
    return Table(f"How it was asked (longest prompt: {arguments['max_length'] or 'any'} tokens)", heads, lines)


def _figure(arguments: Mapping[str, Any], cells: Mapping[MethodAt, Sequence[Row]]) -> Drawing | None:
    """Mean against budget, a line per method; of budgets of one kind only."""
    points: dict[str, list[tuple[int | float, Estimate]]] = {}
    level = None
    for (method, budget), part in cells.items():
        mean = mean_interval(*(list(values.values()) for values in _scores(part).values()))
        if budget is None:
            level = mean
        else:
            points.setdefault(method, []).append((budget, mean))
    if not points or len({type(budget) for budget in arguments["budgets"]}) > 1:
        return None
    lines = [Line(label, [x for x, _ in some], [mean for _, mean in some]) for label, some in points.items()]
    return Drawing(
        "Mean over tasks, x 100, against the budget. Bars are 95 % intervals.",
        partial(line_panels, [Panel("", lines, level)], arguments["methods"][1:], "budget", "mean x 100", log_x=True),
    )

"""Needle in a haystack: one marked thing (task niah_single) at every depth of contexts of every length; a heat map per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality.ruler import Plan, run
from bench.report.figures import Grid, heat_maps, need_matplotlib, save_png
from bench.report.stats import grouped
from bench.runs.folder import Report, read_rows
from bench.runs.methods import Method
from restkv.errors import PromptError
from restkv.lm import LM

TASK = "niah_single"


def needle_plan(
    lengths: Sequence[int], depths: int, methods: Sequence[Method], compression: float, samples: int, **options: Any
) -> Plan:
    """A plan of `depths` depths, evenly from 0 (the beginning of the context) to 1 (its end).

    Raises:
        PromptError: fewer than 2 depths.
    """
    if depths < 2:
        raise PromptError(f"depths {depths}: from the beginning of the context to its end there are at least 2")
    places = tuple(round(step / (depths - 1), 4) for step in range(depths))
    return Plan((TASK,), tuple(lengths), tuple(methods), (compression,), samples, depths=places, **options)


def run_needle(lm: LM, plan: Plan, folder: Path, report: Report | None = None) -> list[Path]:
    """Run the plan, or what is missing of it, and draw: needle-METHOD.png for each method, needle.png side by side.

    Returns:
        The pictures.
    Raises:
        OutputError: matplotlib is missing (before anything is run). Otherwise as bench.quality.ruler.run.
    """
    need_matplotlib()
    run(lm, plan, folder, kind="needle", report=report)
    return draw_needle(read_rows(folder), folder)


def draw_needle(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """The pictures of the rows there are, complete or not."""
    pictures = []
    for (mode,), part in grouped(rows, "question").items():
        grids = needle_grids(part)
        for grid in grids:
            name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in grid.title)
            pictures.append(folder / f"needle-{mode}-{name}.png")
            save_png(needle_figure([grid]), pictures[-1])
        pictures.append(folder / f"needle-{mode}.png")
        save_png(needle_figure(grids), pictures[-1])
    return pictures


def needle_grids(rows: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Mean score by depth (down) and length (across), one map per method."""
    depths, lengths = sorted({row["depth"] for row in rows}), sorted({row["length"] for row in rows})
    grids = []
    for (method,), part in grouped(rows, "method").items():
        cells = {place: [row["score"] for row in some] for place, some in grouped(part, "depth", "length").items()}
        values = [[_mean(cells.get((depth, length))) for length in lengths] for depth in depths]
        grids.append(Grid(method, [f"{depth:.0%}" for depth in depths], list(map(str, lengths)), values))
    return grids


def needle_figure(grids: Sequence[Grid]) -> Any:
    return heat_maps(grids, "depth of the needle", "tokens", "needle found", limits=(0, 1))


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None

"""Needle in a haystack: one marked thing (task niah_single) at every depth of contexts of every length; a heat map per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.quality.ruler import PLACED, RULER, Plan
from bench.report.figures import save_png
from bench.report.retrieval import needle_figure, needle_grids, needle_parts
from bench.report.stats import grouped
from bench.runs import schema as must
from bench.runs.benchmark import register
from bench.runs.methods import Method
from restkv.errors import PromptError

TASK = "niah_single"


def needle_plan(
    lengths: Sequence[int], depths: int, methods: Sequence[Method], compression: float, samples: int, **options: Any
) -> Plan:
    """A plan of `depths` depths, evenly from 0 (the beginning of the context) to 1 (its end)."""
    if depths < 2:
        raise PromptError(f"depths {depths}: from the beginning of the context to its end there are at least 2")
    places = tuple(round(step / (depths - 1), 4) for step in range(depths))
    return Plan(
        (TASK,), tuple(lengths), tuple(methods), (compression,), samples, depths=places, kind="needle", **options
    )


def draw_needle(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """needle-METHOD.png for each method and needle.png side by side, of the rows there are."""
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


register(
    replace(
        RULER,
        name="needle",
        title="Needle in a haystack",
        parts=needle_parts,
        rows={**PLACED, "depth": must.number(0, 1)},
        pictures=draw_needle,
    )
)

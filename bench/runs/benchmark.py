"""What a benchmark is, and the registry of all of them.

A benchmark is one object: its name, what its manifests and rows must hold, and what a report shows of them. Its module
registers it; running (bench/runs/run.py), reporting (bench/report) and the command line find it here by name. What there is to
measure is said by a plan (bench.runs.run.Plan).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.runs.schema import Fields

Arguments = Mapping[str, Any]  # of a run, as its manifest has them
Line = Mapping[str, Any]  # a row as it is read (bench.runs.rows.Row.line)

EAGER = "sdpa"  # every budget is a cache of another shape, and compiling for each takes longer than its short answers
# Modules of what restkv comes with, imported when one of them is asked for: most need torch, and tables of one need no other.
MODULES = {
    "ruler": "bench.quality.ruler",
    "needle": "bench.quality.needle",
    "fidelity": "bench.quality.fidelity",
    "anli": "bench.quality.anli",
    "perplexity": "bench.quality.perplexity",
    "smoothing": "bench.quality.smoothing",
    "documents": "bench.quality.documents",
    "longbench": "bench.published.run",
    "infinitebench": "bench.published.run",
    "ruler-official": "bench.published.run",
    "needle-official": "bench.published.run",
    "compile": "bench.speed.compiling",
}


@dataclass(frozen=True)
class Table:
    """A caption, column heads and lines of text."""

    caption: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Drawing:
    """A figure (of matplotlib) to be drawn when it is wanted, so that tables need no matplotlib."""

    caption: str
    draw: Callable[[], Any]


Part = Table | Drawing


@dataclass(frozen=True)
class Benchmark:
    """A measurement whose results are rows in a folder.

    Attributes:
        name: the kind of its runs, as their manifests have it.
        title: of its pages.
        parts: from a run's arguments and rows (as many as there are) to tables and figures, in reading order.
        rows: what a row must hold besides bench.runs.schema.ROW. Rows of several parts: what each must hold, by the row's `part`.
        arguments: what a manifest's arguments must hold; all have "methods", and "results" where
            none may grow.
        may_grow: a number among the arguments that may be larger when a run is gone on with: what it adds comes after the rest.
        total: rows of the complete run, by its arguments, where they do not say it as "results".
        pictures: draws files of their own into the run's folder, from its rows.
    """

    name: str
    title: str
    parts: Callable[[Arguments, Sequence[Line]], list[Part]]
    rows: Fields | Mapping[str, Fields]
    arguments: Fields
    may_grow: str | None = None
    total: Callable[[Arguments], int] = lambda arguments: arguments["results"]
    pictures: Callable[[Sequence[Line], Path], list[Path]] | None = None


_registered: dict[str, Benchmark] = {}


def register(*benchmarks: Benchmark) -> None:
    """Make benchmarks known by their names; a second one of a name takes the place of the first."""
    _registered.update({benchmark.name: benchmark for benchmark in benchmarks})


def benchmark(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        KeyError: there is none.
    """
    if name not in _registered:
        import_module(MODULES[name])
    return _registered[name]


def names() -> list[str]:
    """Of all benchmarks."""
    return list(dict.fromkeys([*MODULES, *_registered]))

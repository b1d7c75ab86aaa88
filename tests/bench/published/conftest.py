"""Fixtures of the published benchmarks: the checkpoint, every suite, and a finished run of each."""

from __future__ import annotations

from pathlib import Path

import pytest

import restkv
from bench.published.haystack import haystack
from bench.published.infinitebench import infinitebench
from bench.published.longbench import longbench
from bench.published.ruler import ruler
from bench.published.suite import OFFICIAL, PAPER, Suite
from bench.runs.methods import parse_methods
from bench.runs.run import run
from make.official_files import (
    write_essays,
    write_infinitebench,
    write_longbench,
    write_ruler,
)
from make.official_runs import plan, short
from restkv.cli.options import RECALL


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


@pytest.fixture(scope="module")
def suites(lm: restkv.LM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Suite]:
    folder = tmp_path_factory.mktemp("data")
    write_infinitebench(folder / "infinite", 1)
    return {
        "longbench": short(longbench(lm, write_longbench(folder / "long", 1), None, OFFICIAL, None)),
        "infinitebench": short(infinitebench(lm, folder / "infinite", None, PAPER, None)),
        "ruler-official": short(ruler(lm, write_ruler(folder / "ruler"), None, None, OFFICIAL)),
        "needle-official": short(haystack(lm, write_essays(folder / "essays"), [260, 280], 3, PAPER, None)),
    }


@pytest.fixture(scope="module")
def finished(lm: restkv.LM, suites: dict[str, Suite], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every benchmark, run with every task."""
    folder = tmp_path_factory.mktemp("runs")
    few = tuple(parse_methods("restkv:window=4"))
    return {kind: run(lm, plan(suite, methods=few, budgets=(16,)), folder / kind) for kind, suite in suites.items()}

"""Runs killed at any byte of their results go on to the file, and the tables, of an unbroken run: every bench.

A kill can only leave the beginning of samples.jsonl, which is written line by line (test_runs.py); here it is cut off
in the middle of a line. The same by a real kill -9 of the command: test_bench_ruler.py, test_bench_smoothing.py,
test_official_run.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import bench.published.run
import bench.quality.ruler
import restkv
from bench.published.haystack import haystack
from bench.published.infinitebench import infinitebench
from bench.published.longbench import longbench
from bench.published.ruler import ruler
from bench.published.run import Plan
from bench.published.suite import OFFICIAL, PAPER, Suite
from bench.quality.anli import AnliPlan
from bench.quality.corpus import Document
from bench.quality.documents import DocumentsPlan
from bench.quality.fidelity import FidelityPlan
from bench.quality.perplexity import PerplexityPlan, Protocol
from bench.quality.ruler import Plan as RulerPlan
from bench.quality.smoothing import SmoothingPlan
from bench.report.page import markdown
from bench.runs.folder import SAMPLES, TIMINGS, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from make.lines import jsonl
from make.official_files import write_essays, write_infinitebench, write_longbench, write_ruler
from restkv.cli.options import RECALL
from restkv.lm import LM

METHODS = tuple(parse_methods("restkv:window=4,h2o"))
STORY = (RECALL / "story.txt").read_text(encoding="utf-8")
Runner = Callable[..., Path]  # (folder, report): the whole of a small run


@pytest.fixture(scope="module")
def lm() -> LM:
    return restkv.load(RECALL)


def official(lm: LM, suite: Suite) -> Runner:
    sources = [replace(one, task=replace(one.task, max_new_tokens=2)) for one in suite.sources[:3]]
    plan = Plan(replace(suite, sources=tuple(sources)), "recall-mini", METHODS, (16, 0.5))
    return lambda folder, report=None: run(lm, plan, folder, report)


def anli_folder(root: Path) -> Path:
    for number in (1, 2, 3):
        (root / f"R{number}").mkdir(parents=True)
        row = {"context": "The red hat was in the old barn. " * 4, "hypothesis": "The hat is red.", "label": "e"}
        (root / f"R{number}" / "test.jsonl").write_text(f"{json.dumps(row)}\n")
    return root


def runner(lm: LM, kind: str, data: Path) -> Runner:
    if kind == "longbench":
        return official(lm, longbench(lm, write_longbench(data, 2), None, OFFICIAL, None))
    if kind == "infinitebench":
        return official(lm, infinitebench(lm, write_infinitebench(data), ["passkey", "math_calc"], PAPER, None))
    if kind == "ruler-official":
        return official(lm, ruler(lm, write_ruler(data, [128]), None, None, OFFICIAL))
    if kind == "needle-official":
        return official(lm, haystack(lm, write_essays(data), [260], 3, PAPER, None))
    if kind == "anli":
        anli = AnliPlan(anli_folder(data), METHODS, (0.3, 12))
        return lambda folder, report=None: run(lm, anli, folder, report)
    if kind == "smoothing":
        smoothing = SmoothingPlan(METHODS, (4.0, 8.0), None, 128, 16, windows=2, samples=1)
        return lambda folder, report=None: run(lm, smoothing, folder, report)
    if kind == "documents":
        pieces = [STORY[at : at + 300] for at in (0, 300)]
        rows = [{"input": text, "instructions": ["Who?", "Why?"], "outputs": ["Tom.", "So it was."]} for text in pieces]
        asked = DocumentsPlan(jsonl(data, *rows), METHODS, (4.0, 8.0), "both", answer_tokens=4)
        return lambda folder, report=None: run(lm, asked, folder, report)
    if kind == "ruler":
        made = RulerPlan(("niah_single", "vt"), (160,), METHODS, (8.0, 4.0), 1)
        return lambda folder, report=None: run(lm, made, folder, report=report)
    if kind == "fidelity":
        fidelity = FidelityPlan(STORY, METHODS, (8, 16), 40, 8, 3, 1, 24)
        return lambda folder, report=None: run(lm, fidelity, folder, report)
    how = Protocol(kind, 12, 40 if kind == "prefill" else 0, 5 if kind == "chunked" else 0)
    texts = PerplexityPlan((Document("story", STORY),), METHODS, (8, 0.5), how, windows=3)
    return lambda folder, report=None: run(lm, texts, folder, report)


KINDS = (
    "longbench", "infinitebench", "ruler-official", "needle-official", "anli", "streaming", "prefill", "chunked", "smoothing",
    "documents", "ruler", "fidelity",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_byte_a_run_ends_as_an_unbroken_one(kind: str, lm: LM, tmp_path: Path) -> None:
    make = runner(lm, kind, tmp_path / "data")
    whole = make(tmp_path / "whole")
    results = (whole / SAMPLES).read_bytes()
    tables = markdown(whole)
    rng = random.Random(kind)
    for _ in range(3):
        killed = shutil.copytree(whole, tmp_path / "killed", dirs_exist_ok=True)
        (killed / SAMPLES).write_bytes(results[: rng.randrange(len(results))])
        timings = (whole / TIMINGS).read_bytes()
        (killed / TIMINGS).write_bytes(timings[: rng.randrange(len(timings))])  # of each file what had reached the disk
        make(killed)
        assert (killed / SAMPLES).read_bytes() == results
        assert markdown(killed) == tables


@pytest.mark.parametrize(("kind", "module"), [("longbench", bench.published.run), ("ruler", bench.quality.ruler)])
def test_what_a_kill_left_of_an_items_answers_is_made_in_the_batch_it_would_have_come_from(
    kind: str, module: object, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are rows of one batch, and a batch of other rows may round otherwise, into another token."""
    counts = []
    answer_all = module.answer_all  # type: ignore[attr-defined]

    def counted(lm: LM, policies: list, *rest: object, **options: object) -> object:
        counts.append(len(policies))
        return answer_all(lm, policies, *rest, **options)

    monkeypatch.setattr(module, "answer_all", counted)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    make = runner(lm, kind, tmp_path / "data")
    with pytest.raises(Stop):
        make(tmp_path / "run", stop)
    assert len(read_rows(tmp_path / "run")) == 2
    make(tmp_path / "run")
    assert set(counts) == {1 + 2 * 2}

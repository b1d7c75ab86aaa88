"""What the two protocols of the published benchmarks do differently when they run: cuts, stop rules, evictions, scorers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bench.published.run
import restkv
from bench.published.haystack import haystack
from bench.published.infinitebench import infinitebench
from bench.published.longbench import longbench
from bench.published.ruler import ruler
from bench.published.run import Plan, answer, encode
from bench.published.suite import OFFICIAL, PAPER, Item, Suite
from bench.runs.folder import read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from make.official_files import write_essays, write_infinitebench, write_longbench, write_ruler
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.lm import LM

BOTH = (OFFICIAL, PAPER)


@pytest.fixture(scope="module")
def lm() -> LM:
    return restkv.load(RECALL)


def short(suite: Suite) -> Suite:
    return replace(suite, sources=tuple(replace(s, task=replace(s.task, max_new_tokens=3)) for s in suite.sources))


def suite_of(lm: LM, kind: str, protocol: str, data: Path) -> Suite:
    if kind == "longbench":
        return longbench(lm, write_longbench(data, 1), None, protocol, None)
    if kind == "infinitebench":
        return infinitebench(lm, write_infinitebench(data, 1), None, protocol, None)
    if kind == "ruler-official":
        return ruler(lm, write_ruler(data, [128]), None, None, protocol)
    return haystack(lm, write_essays(data), [260], 2, protocol, None)


@pytest.mark.filterwarnings("ignore:prompts of up to")  # InfiniteBench grants a prompt all of a small model's positions
@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize(
    ("kind", "tasks"),
    [("longbench", (16, 16)), ("infinitebench", (12, 12)), ("ruler-official", (13, 11)), ("needle-official", (2, 2))],
)
def test_every_task_runs_in_both_protocols(
    kind: str, tasks: tuple[int, int], protocol: str, lm: LM, tmp_path: Path
) -> None:
    suite = short(suite_of(lm, kind, protocol, tmp_path / "data"))
    run(lm, Plan(suite, "recall-mini", tuple(parse_methods("full")), (16,)), tmp_path / "run")
    rows, arguments = read_rows(tmp_path / "run"), read_manifest(tmp_path / "run")["arguments"]
    assert len(rows) == tasks[BOTH.index(protocol)] and {row["protocol"] for row in rows} == {protocol}
    assert all(0 <= row["score"] <= 1 for row in rows)
    scored_by_rouge = kind == "infinitebench" or (kind, protocol) == ("needle-official", OFFICIAL)
    assert ("rouge-score" in arguments) == scored_by_rouge


def test_the_papers_protocol_evicts_the_prompt_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the method does elsewhere while it decodes; an interval that is asked for stays."""
    data = write_longbench(tmp_path / "data", 1, ["trec"])
    given = f"--data {data} --tasks trec --budgets 16 --methods h2o,tova:interval=2 --limit 1".split()
    intervals = {}
    for protocol in BOTH:
        out = tmp_path / protocol
        assert main(["bench", "longbench", *given, "--protocol", protocol, "--out", str(out)]) == 0
        methods = read_manifest(out)["methods"]
        intervals[protocol] = [methods[label]["policy"]["interval"] for label in ("h2o", "tova:interval=2")]
    assert intervals == {OFFICIAL: [1, 2], PAPER: [None, 2]}


# -- what is asked


CUT = Item("One day Tim went to the park. He saw the big red ball near the tree. He was happy.", [], "here")


def test_the_halves_of_a_cut_prompt_are_decoded_as_the_benchmark_does_it(stories260k: Path, tmp_path: Path) -> None:
    """SentencePiece drops the space before a text's first word: LongBench's halves meet without one, InfiniteBench's with it."""
    lm = restkv.load(stories260k)
    words = lm.tokenizer
    assert words is not None
    for kind, protocol, text in (
        ("longbench", OFFICIAL, "One day TimHe was happy."),
        ("longbench", PAPER, "One day TimHe was happy."),
        ("infinitebench", OFFICIAL, "One day Tim He was happy."),
        ("infinitebench", PAPER, "One day TimHe was happy."),
    ):
        suite = suite_of(lm, kind, protocol, tmp_path / kind)
        ids, cut, _ = encode(lm, CUT, False, 8, suite.joined)
        assert ids == words.encode(text) and cut > 0, (kind, protocol)


# -- where answers end


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], bool]]:
    """What answers were ended by, and whether their first token could end them."""
    seen = []
    answer_all = bench.published.run.answer_all

    def looked_at(*given: Any, eos: list[int], least_one: bool) -> Any:
        seen.append((sorted(eos), least_one))
        return answer_all(*given, eos=eos, least_one=least_one)

    monkeypatch.setattr(bench.published.run, "answer_all", looked_at)
    return seen


@pytest.mark.parametrize(
    ("kind", "protocol", "task", "ended_by", "least_one"),
    [
        ("longbench", OFFICIAL, "hotpotqa", "checkpoint", False),
        ("longbench", PAPER, "hotpotqa", "tokenizer", True),
        ("longbench", OFFICIAL, "samsum", "line break", True),
        ("longbench", PAPER, "samsum", "tokenizer", True),
        ("infinitebench", OFFICIAL, "passkey", "checkpoint", False),
        ("infinitebench", PAPER, "passkey", "tokenizer", True),
        ("ruler-official", OFFICIAL, "vt", "checkpoint", False),
        ("ruler-official", PAPER, "vt", "tokenizer", True),
        ("needle-official", OFFICIAL, "needle", "line break", False),
        ("needle-official", PAPER, "needle", "line break", False),
    ],
)
def test_answers_end_where_the_scripts_end_them(
    kind: str, protocol: str, task: str, ended_by: str, least_one: bool, ends: list, tmp_path: Path
) -> None:
    """A checkpoint whose generation settings name one more end than its tokenizer, as Llama 3's do."""
    folder = shutil.copytree(RECALL, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    lm = restkv.load(folder)
    words = lm.tokenizer
    assert words is not None and words.eos_ids == (1,)
    suite = short(suite_of(lm, kind, protocol, tmp_path / "data"))
    source = next(source for source in suite.sources if source.task.name == task)
    plan = Plan(suite, "recall-mini", tuple(parse_methods("full")), (16,))
    answer(lm, plan, source, 0)
    newline = words.encode("\n", bos=False)[-1]
    expected = {"checkpoint": [1, 9], "tokenizer": [1], "line break": [1, newline]}[ended_by]
    assert ends == [(sorted(expected), least_one)]

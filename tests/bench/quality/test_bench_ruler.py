"""The retrieval bench: one prefill for all policies, equal bytes, runs that survive kill -9, and its command."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import restkv
from bench.quality.needle import draw_needle, needle_plan
from bench.quality.ruler import Plan, answer
from bench.quality.tasks import TASKS, Frame, Sample, make_sample
from bench.runs.folder import SAMPLES, RunError, digest, read_manifest, read_rows
from bench.runs.methods import Method, equal_bytes, parse_methods
from bench.runs.plans import cells_of
from bench.runs.run import run
from bench.runs.sharing import BudgetRead, UnreadTensor, UnreadTuple
from bench.runs.together import (
    Held,
    answer_together,
    kept_mean,
    prefill_all,
    prefill_together,
)
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.session import Session

EVERY = (
    "restkv,restkv:budget_by=global,restkv:gqa=joint:aggregate=indicator,restkv:granularity=query,snapkv,pyramidkv,adakv,"
    "h2o,h2o:granularity=query,tova,streamingllm,lacache,expected-attention,caote,keynorm,keydiff,random,"
    "kvzip-plus,compactor,rkv,curdkv,kvzip,kvzip:probe=draft:5,snapkv:probe=draft:5,snapkv:probe=window+draft:5,restkv:granularity=query:probe=prompt+questions"
)
METHODS = parse_methods(EVERY)
FEW = "restkv,h2o,streamingllm,snapkv:granularity=query"


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


@pytest.fixture(scope="module")
def frame(lm: restkv.LM) -> Frame:
    return Frame(lm.tokenizer)


@pytest.fixture(scope="module")
def sample(frame: Frame) -> Sample:
    return make_sample("niah_single", 200, 0, 0, frame)


@pytest.fixture(scope="module")
def ids(frame: Frame, sample: Sample) -> list[int]:
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    return context + asked


def plan(**changes: Any) -> Plan:
    few = Plan(("niah_single", "cwe"), (256,), tuple(parse_methods("restkv,snapkv:granularity=query")), (8.0,), 2)
    return replace(few, **changes)


# -- one prefill for all


@pytest.mark.parametrize(
    "look", [list, len, bool, lambda known: known[0], lambda known: known == (3,), lambda known: 3 in known]
)
def test_no_look_at_a_budget_goes_unseen(look):
    """A score that asks for its budget is not shared with other budgets'."""
    with pytest.raises(BudgetRead):
        look(UnreadTuple())
    for read in (int, lambda budget: budget - 1, lambda budget: budget.tolist()):
        with pytest.raises(BudgetRead):
            read(UnreadTensor())


def test_a_shared_prefill_leaves_what_each_policy_alone_would_have(lm: restkv.LM, ids: list[int]) -> None:
    def new() -> list[Session]:
        return [Session(lm.engine, method.policy(24), [len(ids)], 8) for method in METHODS]

    together = new()
    prefill_together(lm, together, ids)
    for alone, shared in zip(new(), together, strict=True):
        alone.prefill([ids])
        name = shared.policy.name
        assert torch.equal(alone.logits_BV, shared.logits_BV), name
        for one, other in zip(alone.cache.layers, shared.cache.layers, strict=True):
            (slot, pos), (their_slot, their_pos) = one.slots(), other.slots()
            assert torch.equal(pos, their_pos), name
            assert torch.equal(one.pool.k[0, 0, slot], other.pool.k[0, 0, their_slot]), name
            for companion, slab in one.pool.companions.items():
                assert torch.equal(slab[slot], other.pool.companions[companion][their_slot]), (name, companion)
        for token in ids[:3]:  # what decoding needs is there too: remembered queries, schedules, positions
            for session in (alone, shared):
                session.feed(torch.tensor([token]))
            assert torch.equal(alone.logits_BV, shared.logits_BV), name


@pytest.mark.parametrize("once", (False, True))
@pytest.mark.parametrize("mode", ("aware", "agnostic"))
def test_answers_are_those_of_the_public_api(
    lm: restkv.LM, frame: Frame, sample: Sample, mode: str, once: bool
) -> None:
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    policies = [method.policy(24) for method in parse_methods(EVERY, once)]
    for policy, (held, row) in zip(policies, answer(lm, frame, sample, mode, policies), strict=True):
        options = {"max_new_tokens": sample.max_new_tokens, "stop": "."}
        if mode == "aware":
            text, kept = lm.generate(context + asked, policy, **options).text, None
        else:
            compressed = lm.compress(context, policy)
            text, kept = compressed.ask(asked, **options).text, compressed.kept
        assert row["output"] == text, policy.name
        assert kept is None or held.kept == pytest.approx(sum(kept) / len(kept), abs=1e-3)
        assert row["tokens"] == len(context + asked)


def test_policies_that_evict_no_more_share_a_session_and_keep_what_each_alone_would(
    lm: restkv.LM, ids: list[int]
) -> None:
    """And scores that do not depend on the budget are computed once: what is kept under 24 entries and under 40 is right."""
    kinds = [(method.policy(entries), interval) for method in METHODS for entries in (24, 40) for interval in (None, 1)]
    policies = [replace(policy, interval=interval) for policy, interval in kinds]
    groups = answer_together(lm, policies, len(ids), 8, extends=False)
    prefill_all(lm, groups, ids)
    assert sorted(index for group in groups for index in group.about) == list(range(len(policies)))
    assert max(len(group.policies) for group in groups) >= 4
    for group in groups:
        for row, policy in enumerate(group.policies):
            alone = Session(lm.engine, policy, [len(ids)], 8)
            alone.prefill([ids])
            companions = {name for layer in alone.cache.layers for name in layer.pool.companions}
            assert group.held()[row] == Held(kept_mean(alone), alone.cache.live_bytes), (policy, companions)
            for one, other in zip(alone.cache.layers, group.session.cache.layers, strict=True):
                _, pos_KC = one.slots()
                _, their_pos_RC = other.slots()
                heads = slice(row * one.heads, (row + 1) * one.heads)
                for mine, theirs in zip(pos_KC.tolist(), their_pos_RC[heads].tolist(), strict=True):
                    assert [p for p in mine if p >= 0] == [p for p in theirs if p >= 0], policy


def test_a_right_answer_scores(lm: restkv.LM, frame: Frame, sample: Sample) -> None:
    ((_, row),) = answer(
        lm, frame, replace(sample, context="They ran.", answers=("nothing",)), "aware", [restkv.FullCache()]
    )
    said = row["output"].split()
    assert row["score"] == 0 and said
    known = replace(sample, context="They ran.", answers=(said[0], "nothing"))
    ((_, row),) = answer(lm, frame, known, "aware", [restkv.FullCache()])
    assert row["score"] == 0.5


# -- methods and equal bytes


def test_methods_are_written_with_presets_and_options() -> None:
    method = Method.parse("restkv@paper-ruler:granularity=kv:alpha=none:interval=none")
    policy = method.policy(64)
    assert (policy.name, policy.budget, policy.granularity, policy.interval) == ("restkv", 64, "kv", None)
    assert isinstance(policy, restkv.ReSTKV) and (policy.kernel_size, policy.alpha) == (21, None)
    assert [m.label for m in parse_methods(" snapkv, restkv,snapkv,full,")] == ["full", "snapkv", "restkv"]
    spans = parse_methods("snapkv:protect=[[0,4],[8,9]]:window=4,restkv")
    assert len(spans) == 3 and spans[1].policy(64).protect == ((0, 4), (8, 9))
    assert Method.parse("restkv").describe(64)["policy"]["budget"] == 64
    once = [method.policy(64).interval for method in parse_methods("h2o,snapkv@official,tova:interval=4", once=True)]
    assert once == [128, None, None, 4]  # the full cache has nothing to evict; what an option says stays


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("restkv:budget_by=pyramid", 128),
        ("restkv@paper:budget_by=pyramid", 128),
        ("pyramidkv", 128),
        ("pyramidkv@official", 142.5),
    ],
)
def test_a_pyramid_spends_its_budget_exactly_unless_a_preset_is_one(text: str, mean: float) -> None:
    assert sum(Method.parse(text).policy(128).layer_budgets(8192, 32)) / 32 == mean


def test_a_method_says_which_code_it_runs() -> None:
    code = inspect.getsource(sys.modules[restkv.SnapKV.__module__])
    assert Method.parse("snapkv").describe(64)["source"] == digest(code) != digest(code + " ")


def test_no_two_cells_share_a_key() -> None:
    budgets = (1, 1.0, 3.333333, 3.3333333, 1_234_567, 1_234_568, 8.0, 0.5)
    keys = [cell.key for cell in cells_of(parse_methods("restkv"), budgets)]
    assert len(set(keys)) == 9 and {"full/1", "restkv/1", "restkv/8", "restkv/0.5"} < set(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "method 'nothing' is unknown"),
        ("restkv:alpha", "'alpha' is not OPTION=VALUE"),
        ("restkv:budget=3", "budgets are the bench's own option"),
        ("restkv:colour=red", "option 'colour' is unknown"),
        ("restkv@papers", "preset 'papers' is unknown"),
        ("h2o@official", "recent 512: they are part of the budget of 64"),
    ],
)
def test_methods_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Method.parse(text).policy(64)


def test_an_option_may_be_called_none() -> None:
    assert Method.parse("restkv:pooling=none:interval=none").policy(64) == restkv.ReSTKV(
        budget=64, pooling="none", interval=None
    )


def test_windows_shrink_to_half_a_small_budget_unless_they_were_asked_for() -> None:
    assert [Method.parse("restkv").policy(n).window for n in (20, 64, 200)] == [10, 32, 32]
    assert Method.parse("restkv:window=4").policy(20).window == 4
    assert Method.parse("h2o").policy(20).window == 0
    with pytest.raises(PolicyError, match="give at least 32"):
        Method.parse("snapkv@official").policy(20)


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.label)
@pytest.mark.parametrize("entries", (16, 40))
def test_every_method_keeps_the_same_bytes(lm: restkv.LM, ids: list[int], method: Method, entries: int) -> None:
    policy = equal_bytes(lm, method, entries, lambda: ids)
    assert isinstance(policy.budget, int)
    budgets = [policy.budget] if policy.granularity == "kv" else [policy.budget, policy.budget + 1]
    kept = []
    for budget in budgets:
        session = Session(lm.engine, replace(policy, budget=budget), [len(ids)], 1)
        session.prefill([ids])
        kept.append(kept_mean(session))
    ladders = method.name == "lacache"  # drops whole ladders
    assert kept[0] <= entries and kept[0] > (0.75 if ladders else 0.9) * entries
    if policy.granularity == "query":
        assert kept[1] > entries  # one more would have been too many


# -- runs


def test_rows_say_everything_they_depend_on(lm: restkv.LM, tmp_path: Path) -> None:
    run(lm, plan(), tmp_path)
    rows = read_rows(tmp_path)
    assert len(rows) == 2 * 2 * 2 * 3  # tasks, samples, questions, methods
    row = next(row for row in rows if row["key"] == "agnostic/cwe/256/1/snapkv:granularity=query/8")
    assert (row["granularity"], row["asked"], row["seed"], row["observed"]) == ("query", 8, 0, 16)
    assert row["budget"] < 32 and 28 < row["kept"] < 36  # 32, found on another sample
    assert row["versions"].startswith("restkv ") and "torch" in row["versions"]
    assert row["answers"] == list(make_sample("cwe", 256, 0, 1, Frame(lm.tokenizer)).answers)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 4 and all(row["tokens"] <= 256 for row in rows)
    described = read_manifest(tmp_path)
    assert described["methods"]["snapkv:granularity=query"]["policy"]["kernel_size"] == 5
    assert described["arguments"]["methods"] == ["full", "restkv", "snapkv:granularity=query"]


def test_broken_off_anywhere_a_run_ends_with_the_same_file(lm: restkv.LM, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at(count: int) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if done == count:
                raise Stop

        return report

    few = plan(samples=1, question="agnostic", tasks=("niah_single",))
    whole = run(lm, few, tmp_path / "whole") / SAMPLES
    for count in (1, 2):
        with pytest.raises(Stop):
            run(lm, few, tmp_path / "parts", report=stop_at(count))
        assert len(read_rows(tmp_path / "parts")) == count
    run(lm, few, tmp_path / "parts", report=stop_at(-1))
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == whole.read_bytes()


def test_more_samples_are_added_to_those_there_are(lm: restkv.LM, tmp_path: Path) -> None:
    whole = run(lm, plan(samples=2), tmp_path / "whole") / SAMPLES
    run(lm, plan(samples=1), tmp_path / "parts")
    first = (tmp_path / "parts" / SAMPLES).read_bytes()
    run(lm, plan(samples=2), tmp_path / "parts")
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == whole.read_bytes() and whole.read_bytes().startswith(first)
    with pytest.raises(RunError, match="samples 2, this one has 1"):
        run(lm, plan(samples=1), tmp_path / "parts")


def test_a_run_killed_twice_ends_with_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    """kill -9 at any moment, half a line and all."""
    options = f"--tasks niah_single --lengths 160 --methods {FEW} --compression 8 --samples 2 --seed 3".split()
    command = [sys.executable, "-m", "restkv", "bench", "ruler", *options, "--out", str(tmp_path / "killed")]
    samples = tmp_path / "killed" / SAMPLES
    for lines in (2, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (samples.exists() and samples.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = samples.read_bytes().count(b"\n")
        assert lines <= done < 20
        with samples.open("ab") as file:
            file.write(b'{"key": "aware/niah_single/16')
    assert main(command[3:]) == 0
    assert main([*command[3:-1], str(tmp_path / "whole")]) == 0
    assert samples.read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    assert len(read_rows(tmp_path / "whole")) == 20


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, PromptError, "samples 0: give at least 1"),
        ({"tasks": ("niah",)}, PromptError, "task 'niah' is unknown"),
        ({"tasks": ()}, PromptError, "no task is given"),
        ({"question": "known"}, PromptError, "question 'known' is not known; choose from aware, agnostic, both"),
        ({"compression": (0.5,)}, PromptError, "compression 0.5: .* give at least 1"),
        ({"lengths": (60,)}, PromptError, "length 60 is too short"),
        (
            {"methods": tuple(parse_methods("lacache"))},
            PolicyError,
            r"lacache: 6 entries per head \(256 tokens at 40x\): .*ladders need",
        ),
    ],
)
def test_senseless_plans_are_refused_before_anything_is_run(
    lm: restkv.LM, tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    if error is PolicyError:
        changes = {**changes, "compression": (40.0,)}
    with pytest.raises(error, match=message):
        run(lm, plan(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_lengths_beyond_the_model_are_remarked_on(lm: restkv.LM, tmp_path: Path) -> None:
    beyond = lm.config.max_positions + 100
    with pytest.warns(RestKVWarning, match=f"length {beyond} exceeds the model's {lm.config.max_positions} positions"):
        run(lm, plan(lengths=(beyond,), methods=(), samples=1, tasks=("niah_single",)), tmp_path)


# -- needle


def test_a_needle_run_has_every_depth_and_a_picture_of_every_method(lm: restkv.LM, tmp_path: Path) -> None:
    grid = needle_plan((140, 160), 3, parse_methods("restkv,snapkv:kernel_size=3"), 6.0, 1, question="aware")
    pictures = draw_needle(read_rows(run(lm, grid, tmp_path)), tmp_path)
    assert [picture.name for picture in pictures] == [
        "needle-aware-full.png",
        "needle-aware-restkv.png",
        "needle-aware-snapkv-kernel_size-3.png",
        "needle-aware.png",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    rows = read_rows(tmp_path)
    assert {(row["depth"], row["length"]) for row in rows} == {(d, n) for d in (0.0, 0.5, 1.0) for n in (140, 160)}
    assert len(rows) == 6 * 3 and {row["task"] for row in rows} == {"niah_single"}
    with pytest.raises(PromptError, match="depths 1"):
        needle_plan((150,), 1, METHODS, 8.0, 1)


# -- command


def test_the_command_prints_tables_and_one_line_for_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "bench ruler --tasks niah_single --lengths 200 --methods restkv --compression 8 --samples 2".split()
    assert main([*command, "--question", "aware", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "200 tokens, question in sight while evicting (query-aware): mean over tasks [95 %]" in shown.split("\n")
    assert "minus full" in shown
    assert f"restkv bench report {tmp_path}" in shown.replace("\n", "")
    assert main([*command, "--question", "both", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'restkv: error: {tmp_path}: holds a run with question "aware", this one has "both"')
    for bad, message in (
        (["--lengths", "many"], "--lengths 'many': give whole numbers"),
        (["--compression", "x"], "--compression 'x': give numbers"),
        (["--methods", "x"], "method 'x' is unknown"),
    ):
        assert main([*command, *bad, "--out", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from restkv.cli import main; main(['bench', 'ruler', '--help']); sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "--compression" in ran.stdout


def test_a_broken_command_of_another_package_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    from restkv.cli import app

    broken = EntryPoint("broken", "no.such.module:app", "restkv.commands")
    monkeypatch.setattr(app, "entry_points", lambda group: [broken])
    app._command.cache_clear()
    try:
        assert main(["--version"]) == 0
        assert "restkv: note: command 'broken' (no.such.module:app) cannot be used" in capsys.readouterr().err
    finally:
        app._command.cache_clear()


def test_all_tasks_are_known_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "ruler", "--methods", "full", "--samples", "1", "--lengths", "640", "--out", str(tmp_path)]) == 0
    )
    assert {row["task"] for row in read_rows(tmp_path)} == set(TASKS)
    assert json.loads((tmp_path / SAMPLES).read_text().split("\n")[0])["method"] == "full"
    capsys.readouterr()

"""Runs of `restkv bench anli`, `perplexity` and `smoothing`: rows, tables, pages, resuming, refusals."""

from __future__ import annotations

import json
import math
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

import restkv
from bench.quality.anli import AnliPlan
from bench.quality.corpus import Document
from bench.quality.perplexity import PerplexityPlan, Protocol
from bench.quality.smoothing import ARMS, PROBED, SmoothingPlan, arms, by_probe
from bench.report.kinds import parts, progress
from bench.report.page import markdown, write_report
from bench.report.tables import Table
from bench.runs.folder import SAMPLES, read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning

FEW = "restkv,snapkv:granularity=query,h2o"
STORY = (RECALL / "story.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


@pytest.fixture(scope="module")
def anli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "anli_v1.0"
    for number in (1, 2, 3):
        (root / f"R{number}").mkdir(parents=True)
        rows = [
            {
                "uid": f"{number}-{index}",
                "context": f"The red hat was in the old barn for {number} days. " * 4,
                "hypothesis": f"The hat is {'red' if index else 'blue'}.",
                "label": "ce"[index],
            }
            for index in range(2)
        ]
        for split in ("train", "test"):
            text = "".join(json.dumps({**row, "uid": f"{split}-{row['uid']}"}) + "\n" for row in rows)
            (root / f"R{number}" / f"{split}.jsonl").write_text(text)
    return root


def smoothing_plan(**changes: Any) -> SmoothingPlan:
    few = SmoothingPlan(tuple(parse_methods(FEW)), (4.0, 8.0), None, 128, 16, windows=2, samples=1)
    return replace(few, **changes)


def perplexity_plan(protocol: str, **changes: Any) -> PerplexityPlan:
    how = Protocol(protocol, 12, 40 if protocol == "prefill" else 0, 5 if protocol == "chunked" else 0)
    few = PerplexityPlan((Document("story", STORY),), tuple(parse_methods(FEW)), (8, 0.5), how, windows=2)
    return replace(few, **changes)


def runner(lm: restkv.LM, kind: str, anli: Path) -> Callable[..., Path]:
    """runner(folder, report): a small run of a kind."""
    if kind == "anli":
        plan = AnliPlan(anli, tuple(parse_methods(FEW)), (0.3,), rounds=(1, 3), shots=1, limit=1)
        return lambda folder, report=None: run(lm, plan, folder, report)
    if kind == "smoothing":
        return lambda folder, report=None: run(lm, smoothing_plan(), folder, report)
    return lambda folder, report=None: run(lm, perplexity_plan(kind), folder, report)


KINDS = ("anli", "streaming", "prefill", "chunked", "smoothing")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_all_its_rows_a_page_and_the_same_file_wherever_it_was_broken_off(
    lm: restkv.LM, anli: Path, tmp_path: Path, kind: str
) -> None:
    class Stop(Exception):
        pass

    def stop_at(count: int) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            assert done <= total
            if done == count:
                raise Stop

        return report

    run = runner(lm, kind, anli)
    cells = 1 + 3 * (1 if kind == "anli" else 2)
    expected = {"anli": 2 * 2 * cells, "smoothing": (2 + 2 * 2) * cells}.get(kind, 2 * cells)
    whole = run(tmp_path / "whole")
    for count in (1, 3, 9):
        with pytest.raises(Stop):
            run(tmp_path / "parts", stop_at(count))
        assert len(read_rows(tmp_path / "parts")) == count
    assert f"9 of {expected} results" in markdown(tmp_path / "parts")
    run(tmp_path / "parts")
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    manifest, rows = read_manifest(whole), read_rows(whole)
    assert progress(manifest["kind"], manifest["arguments"], rows) == (expected, expected) and len(rows) == expected
    page = write_report(whole).read_text(encoding="utf-8")
    assert "Partial run" not in page and page.count("<img") >= 1
    assert f"{expected} of {expected} results" in markdown(whole)
    for row in rows:
        assert row["versions"] and row["prompt"] and (row["method"] == "full") == (row["entries"] is None)
        if row["method"] == "full":
            continue
        fits = row["entries"] + (8 if row["granularity"] == "query" else 0)  # unions of the run's own prompt fit too
        assert row["kept"] <= fits
        if row["granularity"] == "kv" and kind != "streaming":
            assert row["kept"] >= row["entries"] - 1e-9


def test_rows_of_anli_say_what_was_asked_and_answered(lm: restkv.LM, anli: Path, tmp_path: Path) -> None:
    rows = read_rows(runner(lm, "anli", anli)(tmp_path))
    for row in rows:
        assert row["task"] in ("R1", "R3") and row["name"] == f"test-{row['task'][1]}-0" and row["label"] == 2
        assert row["choice"] == max(range(3), key=lambda i: row["logprobs"][i])
        shares = [math.exp(value) for value in row["logprobs"]]
        assert row["likelihood"] == pytest.approx(shares[2] / sum(shares), abs=1e-6)
        assert row["score"] == (row["choice"] == 2)
    full = {row["question"]: row for row in rows if row["method"] == "full" and row["task"] == "R1"}
    assert full["aware"]["logprobs"] == pytest.approx(full["agnostic"]["logprobs"], abs=1e-4)
    for mode, whole in full.items():  # what is evicted matters, in answers of one token too
        evicted = [row for row in rows if row["question"] == mode and row["task"] == "R1" and row["method"] != "full"]
        assert all(row["logprobs"] != pytest.approx(whole["logprobs"], abs=1e-3) for row in evicted)
    ours = next(row for row in rows if row["method"] == "restkv" and row["question"] == "aware")
    assert ours["entries"] == round(0.3 * ours["tokens"]) == ours["kept"]


def test_anli_says_every_rounds_accuracy_and_what_it_lost() -> None:
    """Two rounds of four; the method loses the first sample of R1, and of R2 what the full cache had wrong too."""
    arguments = {"methods": ["full", "h2o"], "tasks": ["R1", "R2"], "budgets": [0.5]}
    right = {("full", "R1"): "1111", ("full", "R2"): "0011", ("h2o", "R1"): "0111", ("h2o", "R2"): "0011"}
    rows = [
        {"question": "aware", "task": task, "index": index, "method": method, "kept": 9}
        | {"asked": 1.0 if method == "full" else 0.5, "score": float(score)}
        for (method, task), scores in right.items()
        for index, score in enumerate(scores)
    ]
    overall, by_round, *_ = parts("anli", arguments, rows)
    assert isinstance(overall, Table) and isinstance(by_round, Table)
    assert overall.lines[1][3:5] == ["0.750", "0.500"] and overall.lines[1][6].startswith("-0.125 [")
    assert by_round.columns == [
        "method",
        "at",
        "R1 [95 %]",
        "R1 minus full [95 %]",
        "R2 [95 %]",
        "R2 minus full [95 %]",
    ]
    assert by_round.lines[0] == ["full", "1", "1.000 [1.000, 1.000]", "", by_round.lines[1][4], ""]
    assert by_round.lines[1][2:4] == ["0.750 [0.250, 1.000]", "-0.250 [-0.750, +0.000]"]
    assert by_round.lines[1][4].startswith("0.500 [0.000, 1") and by_round.lines[1][5] == "+0.000 [+0.000, +0.000]"
    (alone, *_) = parts("anli", {**arguments, "tasks": ["R1"]}, [row for row in rows if row["task"] == "R1"])[1:]
    assert not isinstance(alone, Table)  # one round: the first table has its interval


def test_perplexities_of_a_table_are_those_of_its_rows(lm: restkv.LM, tmp_path: Path) -> None:
    run(lm, perplexity_plan("prefill"), tmp_path)
    rows, arguments = read_rows(tmp_path), read_manifest(tmp_path)["arguments"]
    (table, *_) = parts("perplexity", arguments, rows)
    assert isinstance(table, Table)
    line = next(line for line in table.lines if line[:2] == ["restkv", "8"])
    some = [row for row in rows if row["method"] == "restkv" and row["asked"] == 8]
    full = [row for row in rows if row["method"] == "full"]
    nats = sum(row["nll"] for row in some)
    for column, unit in enumerate(("tokens", "words", "text_bytes"), 3):
        assert line[column].startswith(f"{math.exp(nats / sum(row[unit] for row in some)):.3f} [")
    over = math.exp((nats - sum(row["nll"] for row in full)) / 24)
    assert line[6].startswith(f"{over:.3f} [") and line[7] == "2"
    ids = lm.tokenizer.encode(STORY)
    window = next(row for row in full if row["window"] == 0)
    log_TV = lm.logits(ids[:52]).double().log_softmax(-1)
    assert window["nll"] == pytest.approx(-sum(float(log_TV[t - 1, ids[t]]) for t in range(40, 52)), abs=1e-3)


def made_rows(arguments: dict) -> list[dict]:
    """restkv: right, 1 nat a token; a rival: wrong at 8x, 2 nats at 8x, otherwise as restkv."""
    rows = []
    for method, asked in [("full", 1.0), *((m, r) for m in arguments["methods"][1:] for r in arguments["compression"])]:
        behind = method == "rival" and asked == 8
        for index in range(4):
            base = {"method": method, "asked": asked, "kept": 9}
            nll = (2 if behind else 1) * (10 + index)
            rows.append({"part": "perplexity", "window": index, "tokens": 10 + index, "nll": nll, **base})
            score = 0.0 if behind else 1.0
            choice = {"part": "choice", "question": "aware", "task": "codes", "index": index, "score": score}
            rows.append({**choice, **base})
    return rows


def test_the_verdict_says_where_the_subject_is_better_and_where_nobody_knows() -> None:
    arguments = {"methods": ["full", "restkv", "rival", "late"], "compression": [4.0, 8.0], "tasks": ["codes"]}
    rows = [row for row in made_rows(arguments) if row["method"] != "late"]
    verdict, text, choice, *_ = [part for part in parts("smoothing", arguments, rows) if isinstance(part, Table)]
    assert [list(line) for line in verdict.lines] == [
        ["perplexity", "rival", "8x", "-", "4x"],
        ["accuracy, query-aware", "rival", "8x", "-", "4x"],
    ]
    assert text.lines == [["rival", "+0.000 [+0.000, +0.000]", "-1.000 [-1.000, -1.000]"]]
    assert choice.lines == [["rival", "+0.000 [+0.000, +0.000]", "+1.000 [+1.000, +1.000]"]]
    swapped = {**arguments, "methods": ["full", "rival", "restkv"]}
    first = parts("smoothing", swapped, rows)[0]
    assert isinstance(first, Table) and [line[2:] for line in first.lines] == [["-", "8x", "4x"]] * 2


def test_the_arms_are_rest_kv_without_its_parts_and_its_rivals() -> None:
    policies = {method.label: method.policy(64) for method in parse_methods(ARMS)[1:]}
    whole = policies["restkv@paper"]
    assert isinstance(whole, restkv.ReSTKV)
    without: dict[str, dict[str, Any]] = {
        "restkv@paper:alpha=none": {"alpha": None},
        "restkv@paper:pooling=none": {"pooling": "none"},
        "restkv@paper:alpha=none:pooling=none": {"alpha": None, "pooling": "none"},
        "restkv@paper:tau=0": {"tau": 0},
        "restkv@paper:output_weight=False": {"output_weight": False},
        "restkv@paper:aggregate=indicator": {"aggregate": "indicator"},
        "restkv@paper:budget_by=global": {"budget_by": "global"},
        "restkv": {"budget_by": "global", "alpha": None},
    }
    for label, change in without.items():
        assert policies[label] == replace(whole, **change) != whole
    assert {policy.name for policy in policies.values()} == {
        "restkv", "snapkv", "h2o", "tova", "streamingllm", "lacache"
    }  # fmt: skip


def test_arms_under_other_probes_than_the_window() -> None:
    labels = [method.label for method in arms(None, ("window", "draft:8"))]
    assert labels[: len(ARMS.split(",")) + 1] == ["full", *ARMS.split(",")]
    assert {*labels[len(ARMS.split(",")) + 1 :]} == {f"{label}:probe=draft:8" for label in PROBED}
    assert {*ARMS.split(",")} > PROBED
    mine = arms("snapkv,h2o,restkv@replay,restkv:probe=prompt", ("replay", "window"))
    assert [method.label for method in mine] == [
        "full", "snapkv:probe=replay", "h2o", "restkv@replay", "restkv:probe=prompt", "snapkv"
    ]  # fmt: skip
    assert by_probe(mine, 64) == {
        "replay": ["snapkv:probe=replay", "h2o", "restkv@replay"],
        "prompt": ["restkv:probe=prompt", "h2o"],
        "window": ["snapkv", "h2o"],
    }
    assert by_probe(arms("h2o,tova", ("window",)), 64) == {"window": ["h2o", "tova"]}
    with pytest.raises(PolicyError, match="probe 'dreaming': 'dreaming' is unknown"):
        arms(None, ("window", "dreaming"))


def test_a_run_under_two_probes_compares_within_each(lm: restkv.LM, tmp_path: Path) -> None:
    plan = smoothing_plan(methods=arms("restkv,snapkv,h2o", ("window", "replay")), question="agnostic")
    run(lm, plan, tmp_path)
    arguments, rows = read_manifest(tmp_path)["arguments"], read_rows(tmp_path)
    assert arguments["arms"] == {
        "window": ["restkv", "snapkv", "h2o"],
        "replay": ["restkv:probe=replay", "snapkv:probe=replay", "h2o"],
    }
    shown = [part for part in parts("smoothing", arguments, rows) if isinstance(part, Table)]
    assert "restkv, restkv:probe=replay" in shown[0].caption
    measures = ("perplexity", "accuracy, query-agnostic", "likelihood of the right answer, query-agnostic")
    assert [line[:3] for line in shown[0].lines] == [
        [measure, probe, other]
        for measure in measures
        for probe, (_, *others) in arguments["arms"].items()
        for other in others
    ]
    caption = "restkv:probe=replay minus the others, likelihood of the right answer, query-agnostic"
    (table,) = [one for one in shown if one.caption.startswith(caption)]
    share = {(row["method"], row["asked"], row["task"]): row["likelihood"] for row in rows if "likelihood" in row}
    tasks = arguments["tasks"]
    for line in table.lines:
        for rate, cell in zip((4.0, 8.0), line[1:], strict=True):
            ours, theirs = ([share[one, rate, task] for task in tasks] for one in ("restkv:probe=replay", line[0]))
            assert float(cell.split(" [")[0]) == pytest.approx((sum(ours) - sum(theirs)) / len(tasks), abs=6e-4)


def test_what_a_method_cannot_work_with_is_left_out_and_said_to_be(lm: restkv.LM, tmp_path: Path) -> None:
    plan = smoothing_plan(methods=tuple(parse_methods("streamingllm")), compression=(8.0, 64.0), question="aware")
    with pytest.warns(RestKVWarning, match="left out: streamingllm at 64x"):
        run(lm, plan, tmp_path)
    assert {row["asked"] for row in read_rows(tmp_path)} == {1, 8}
    assert "streamingllm at 64x" in read_manifest(tmp_path)["arguments"]["left out"]
    with pytest.raises(PolicyError, match="streamingllm: 2 entries per head"):
        run(lm, replace(plan, compression=(64.0,)), tmp_path / "none")


def test_senseless_plans_are_refused_before_anything_is_run(lm: restkv.LM, anli: Path, tmp_path: Path) -> None:
    methods = tuple(parse_methods("lacache"))
    cases: list[tuple[Any, type[Exception], str]] = [
        (smoothing_plan(samples=0), PromptError, "^samples 0: give at least 1"),
        (smoothing_plan(question="some"), PromptError, "question 'some' is not known"),
        (smoothing_plan(documents=(Document("d", "short"),)), PromptError, "no text has the"),
        (perplexity_plan("prefill", windows=0), PromptError, "windows 0: give at least 1"),
        (perplexity_plan("prefill", methods=methods), PolicyError, "lacache: 8 entries per head"),
        (AnliPlan(anli, methods, (0.01,)), PolicyError, "lacache: 8 entries .* of the shortest prompt"),
    ]
    for plan, error, message in cases:
        with pytest.raises(error, match=message):
            run(lm, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_print_tables_and_one_line_for_an_error(
    anli: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "--methods restkv --out".split()
    small = "--tokens 8 --context 32 --windows 1 --budgets 0.25".split()
    assert main(["bench", "perplexity", *small, *base, str(tmp_path / "p")]) == 0
    assert "per word" in capsys.readouterr().out
    limited = ["--data", str(anli), *"--limit 1 --fraction 0.5 --rounds 1 --budgets 0.5 --question aware".split()]
    limited += ["--model", str(RECALL)]
    assert main(["bench", "anli", *limited, *base, str(tmp_path / "a")]) == 0
    assert "minus full" in capsys.readouterr().out
    small = "--length 128 --tail 8 --windows 1 --samples 1 --compression 4 --question aware".split()
    assert main(["bench", "smoothing", *small, *base, str(tmp_path / "s")]) == 0
    assert "restkv minus the others" not in capsys.readouterr().err
    assert main(["bench", "report", "--markdown", str(tmp_path / "s")]) == 0
    assert "Does smoothing pay?" in capsys.readouterr().out
    for wrong in (
        ["smoothing", "--probes", "dreaming"],
        ["perplexity", "--protocol", "gliding"],
        ["smoothing", "--shots", "3"],
        ["anli", "--data", str(tmp_path / "nowhere")],
        ["perplexity", "one", "--model", "another"],
    ):
        assert main(["bench", *wrong, "--out", str(tmp_path / "w")]) != 0
        told = capsys.readouterr().err
        assert told.startswith("restkv: error: ") and told.count("\n") == 1


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    """kill -9 at any moment, half a line and all."""
    options = f"--methods {FEW} --compression 4,8 --length 128 --tail 16 --windows 2 --samples 1".split()
    command = [sys.executable, "-m", "restkv", "bench", "smoothing", *options, "--out", str(tmp_path / "killed")]
    samples = tmp_path / "killed" / SAMPLES
    for lines in (3, 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (samples.exists() and samples.read_bytes().count(b"\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with samples.open("ab") as file:
            file.write(b'{"key": "choice/aware/co')
    assert main(command[3:]) == 0
    assert main([*command[3:-1], str(tmp_path / "whole")]) == 0
    assert samples.read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()

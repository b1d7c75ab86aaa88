"""Runs of the published benchmarks: the public API's answers, runs that survive kill -9, commands and reports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import restkv
from bench.published.haystack import haystack
from bench.published.infinitebench import infinitebench
from bench.published.longbench import longbench
from bench.published.ruler import ruler
from bench.published.run import Plan, answer, encode, run
from bench.published.suite import OFFICIAL, PAPER, Item, Suite
from bench.published.tables import parts, published
from bench.report.kinds import progress
from bench.report.page import build, latex, markdown
from bench.report.tables import Table
from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, RunError, read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.together import answer_all
from make.official_files import (
    longbench_row,
    write_essays,
    write_infinitebench,
    write_jsonl,
    write_longbench,
    write_ruler,
)
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.results import Decoding

METHODS = tuple(parse_methods("restkv:window=4,h2o,streamingllm"))


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


def short(suite: Suite, tokens: int = 3) -> Suite:
    """With answers of a few tokens, so that the real ones of 30,000 need not be waited for."""
    sources = [replace(source, task=replace(source.task, max_new_tokens=tokens)) for source in suite.sources]
    return replace(suite, sources=tuple(sources))


def plan(suite: Suite, **changes: Any) -> Plan:
    return replace(Plan(suite, "recall-mini", METHODS, (16, 0.5)), **changes)


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


# -- answers


def test_every_task_of_every_benchmark_runs(finished: dict[str, Path], suites: dict[str, Suite]) -> None:
    counts = {kind: len(read_rows(folder)) for kind, folder in finished.items()}
    assert counts == {"longbench": 32, "infinitebench": 24, "ruler-official": 52, "needle-official": 12}
    for kind, folder in finished.items():
        rows, manifest = read_rows(folder), read_manifest(folder)
        assert {row["task"] for row in rows} == {source.task.name for source in suites[kind].sources}
        assert progress(kind, manifest["arguments"], rows) == (len(rows), len(rows))
        assert len((folder / TIMINGS).read_text().splitlines()) == len(rows)
        for row in rows:
            assert 0 <= row["score"] <= 1 and row["prompt"] and isinstance(row["output"], str)
            assert row["kept"] <= (row["tokens"] if row["method"] == "full" else 16)
            assert row["budget"] == (None if row["method"] == "full" else 16)
        assert manifest["arguments"]["checkpoint"] == "recall-mini" and manifest["methods"]["restkv:window=4"]["policy"]


def test_answers_are_those_of_the_public_api(lm: restkv.LM, suites: dict[str, Suite]) -> None:
    source = next(source for source in suites["longbench"].sources if source.task.name == "hotpotqa")
    source = replace(source, task=replace(source.task, max_new_tokens=8))
    every = plan(suites["longbench"])
    rows = answer(lm, every, source, source.item(0), every.cells)
    ids = lm.encode(source.item(0).prompt)
    assert len(rows) == 1 + 3 * 2
    for cell, row in zip(every.cells, rows, strict=True):
        assert row["entries"] == {16: 16, 0.5: round(len(ids) / 2), 1.0: len(ids)}[cell.asked]
        alone = lm.generate(ids, cell.method.policy(row["entries"]), max_new_tokens=8)
        assert (row["output"], row["new_tokens"], row["ended"]) == (alone.text, len(alone.tokens), alone.finish_reason)
        assert row["score"] == round(source.task.metric(alone.text, row["answers"], ()), 6)


def test_the_first_token_can_be_kept_from_ending_the_answer(lm: restkv.LM) -> None:
    ids, full = lm.encode("The amber kettle is"), restkv.FullCache()
    first, second = lm.logits(ids)[-1].topk(2).indices.tolist()
    [(_, plain)] = answer_all(lm, [full], ids, Decoding(2), eos=[first])
    assert plain.tokens == [first] and plain.finish_reason == "eos" and plain.text == ""
    [(_, forced)] = answer_all(lm, [full], ids, Decoding(2), eos=[first], least_one=True)
    assert forced.tokens[0] == second and len(forced.tokens) == 2
    [(_, endless)] = answer_all(lm, [full], ids, Decoding(2), eos=[], least_one=True)
    assert endless.tokens[0] == first


def test_long_prompts_lose_their_middle(lm: restkv.LM) -> None:
    words = lm.tokenizer
    assert words is not None
    item = Item("One day Tim went to the park. He saw the big red ball near the tree. He was happy.", [], "here")
    whole = words.encode(item.prompt)
    assert encode(lm, item, False, len(whole)) == (whole, 0, False)
    ids, cut, chat = encode(lm, item, True, 9)  # no chat template: none is used
    assert cut == len(whole) - 8 and not chat
    assert ids == words.encode(words.decode(whole[:4]) + words.decode(whole[-4:]))
    with pytest.raises(restkv.RestKVError, match="here: the prompt is empty"):
        encode(lm, replace(item, prompt=""), False, None)


def test_the_chat_template_is_around_what_is_left(lm: restkv.LM, tmp_path: Path) -> None:
    for file in RECALL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{{ bos_token }}User: {{ messages[0]['content'] }}\nShe said:"
    (tmp_path / "chat_template.jinja").write_text(template)
    chatty = restkv.load(tmp_path)
    item = Item("One day Tim went to the park. He saw the ball.", [], "here")
    ids, cut, chat = encode(chatty, item, True, 8)
    assert chat and cut > 0
    words = chatty.tokenizer
    plain, _, _ = encode(chatty, item, False, 8)
    text = words.decode(plain)
    assert words.decode(ids) == f"User: {text}\nShe said:" or "She said:" in words.decode(ids)
    assert ids == words.encode(words.render([{"role": "user", "content": text}]), bos=False)
    assert [token for token in ids if token == words.bos_id] == ([] if words.bos_id is None else [words.bos_id])


# -- runs


class Stop(Exception):
    pass


def test_a_stopped_run_ends_with_the_file_of_an_unbroken_one(
    lm: restkv.LM, suites: dict[str, Suite], tmp_path: Path
) -> None:
    some = replace(suites["longbench"], sources=suites["longbench"].sources[3:6])

    def stop(done: int, total: int) -> None:
        assert total == 3 * 7
        if done in (2, 9):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            run(lm, plan(some), tmp_path / "parts", report=stop)
    run(lm, plan(some), tmp_path / "parts", report=stop)
    run(lm, plan(some), tmp_path / "whole")
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    with pytest.raises(RunError, match="holds a run with limit null, this one has 1"):
        run(lm, plan(some, limit=1), tmp_path / "parts")


def test_limit_and_fraction_choose_the_same_rows_every_time(lm: restkv.LM, tmp_path: Path) -> None:
    suite = short(longbench(lm, write_longbench(tmp_path, 10, ["lcc"]), None, OFFICIAL, None))
    (source,) = suite.sources
    chosen = {
        (limit, fraction): plan(suite, limit=limit, fraction=fraction).chosen(source)
        for limit in (None, 3, 50)
        for fraction in (1.0, 0.4, 0.01)
    }
    assert chosen[None, 1.0] == chosen[50, 1.0] == list(range(10)) and chosen[3, 1.0] == [0, 1, 2]
    assert chosen[None, 0.4] == [0, 2, 5, 7] and chosen[3, 0.4] == [0, 2, 5] and chosen[None, 0.01] == [0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"limit": 0}, PromptError, "limit 0: give at least 1"),
        ({"fraction": 0.0}, PromptError, "fraction 0: give a number above 0"),
        ({"max_length": 1}, PromptError, "max_length 1: "),
        ({"budgets": (3,)}, PolicyError, r"restkv:window=4: 3 entries per head \(budget 3\)"),
    ],
)
def test_senseless_plans_are_refused_before_anything_is_run(
    lm: restkv.LM, suites: dict[str, Suite], tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(lm, plan(suites["longbench"], **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_prompts_beyond_the_model_are_remarked_on(lm: restkv.LM, suites: dict[str, Suite], tmp_path: Path) -> None:
    one = replace(suites["longbench"], sources=suites["longbench"].sources[:1])
    beyond = lm.config.max_positions
    with pytest.warns(
        RestKVWarning, match=f"up to {beyond} tokens with 3 new ones exceed the model's {beyond} positions"
    ):
        run(lm, plan(one, methods=METHODS[:1], max_length=beyond), tmp_path)


def test_a_run_killed_ends_with_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    """kill -9, half a line and all, through the command."""
    write_longbench(tmp_path / "data", 3, ["hotpotqa", "triviaqa"])
    options = f"--data {tmp_path / 'data'} --methods restkv:window=4,h2o --budgets 16,0.5".split()
    command = [sys.executable, "-m", "restkv.cli", "bench", "longbench", *options, "--out", str(tmp_path / "killed")]
    samples = tmp_path / "killed" / SAMPLES
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= samples.read_bytes().count(b"\n") < 30
    with samples.open("ab") as file:
        file.write(b'{"key": "hotp')
    assert main(command[3:]) == 0
    assert main([*command[3:-1], str(tmp_path / "whole")]) == 0
    assert samples.read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    assert len(read_rows(tmp_path / "whole")) == 3 * 2 * 5


# -- commands and reports


def test_the_commands_print_tables_and_one_line_for_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_longbench(tmp_path / "data", 1, ["hotpotqa"])
    given = ["--data", str(data), "--methods", "restkv:window=4", "--budgets", "16"]
    assert main(["bench", "longbench", *given, "--model", str(RECALL), "--out", str(tmp_path / "long")]) == 0
    shown = capsys.readouterr().out
    assert "hotpotqa" in shown and "own wording" in shown and "minus full" in shown
    ruled = write_ruler(tmp_path / "ruler", [128])
    command = ["bench", "ruler-official", str(RECALL), "--data", str(ruled), "--tasks", "vt", *given[2:]]
    assert main([*command, "--lengths", "128", "--out", str(tmp_path / "rule")]) == 0
    assert "in the data files" in capsys.readouterr().out
    essays = write_essays(tmp_path / "essays")
    command = [
        "bench",
        "needle-official",
        "--data",
        str(essays),
        "--lengths",
        "260:280:20",
        "--depths",
        "2",
        *given[2:],
    ]
    assert main([*command, "--out", str(tmp_path / "needle")]) == 0
    assert {row["length"] for row in read_rows(tmp_path / "needle")} == {260, 280}
    capsys.readouterr()
    for bad, message in (
        (["longbench", "--data", str(tmp_path)], f"{tmp_path}: no file of any task"),
        (["infinitebench", "--data", str(data), "--tasks", "lcc"], "task 'lcc' is not known"),
        (["longbench", str(tmp_path), "--model", "x", "--data", str(data)], "two models are given"),
        (["longbench", "--data", str(data), "--budgets", "x"], "--budgets 'x'"),
    ):
        assert main(["bench", *bad, "--out", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"restkv: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def rows_of(arguments: dict[str, Any], tasks: list[str], score: dict[str, float]) -> list[dict[str, Any]]:
    """Rows that only tables are made of."""
    rows = []
    for task in tasks:
        for index in range(2):
            for method in arguments["methods"]:
                for budget in [None] if method == "full" else arguments["budgets"]:
                    about = {
                        "task": task,
                        "length": None,
                        "depth": None,
                        "index": index,
                        "method": method,
                        "budget": budget,
                    }
                    asked = {
                        "wording": "own wording",
                        "chat": False,
                        "tokens": 100,
                        "cut": index,
                        "kept": budget or 100,
                    }
                    rows.append({**about, **asked, "score": score[method] / (1 + index)})
    return rows


ARGUMENTS: dict[str, Any] = {
    "protocol": "official",
    "checkpoint": "Llama-3.1-8B-Instruct",
    "model": "llama-32x4096-bfloat16-0123456789abcdef",
    "methods": ["full", "restkv@paper-longbench", "snapkv"],
    "budgets": [64, 256],
    "max_length": 7500,
    "tasks": ["hotpotqa", "lcc"],
    "lengths": [],
    "results": 20,
}


def test_tables_have_the_papers_layout_and_its_figures_beside_ours() -> None:
    rows = rows_of(ARGUMENTS, ["hotpotqa", "lcc"], {"full": 0.8, "restkv@paper-longbench": 0.6, "snapkv": 0.4})
    layout, means, asked, _ = parts("longbench", ARGUMENTS, rows)
    assert isinstance(layout, Table) and isinstance(means, Table) and isinstance(asked, Table)
    assert list(layout.columns) == ["method", "budget", "hotpotqa", "lcc", "mean"]
    assert list(layout.lines[0]) == ["full", "", "60.00", "60.00", "60.00"]  # (80 + 40) / 2
    assert [tuple(line[:2]) for line in layout.lines[1:]] == [
        ("restkv@paper-longbench", "64"),
        ("snapkv", "64"),
        ("restkv@paper-longbench", "256"),
        ("snapkv", "256"),
    ]
    assert "published for Llama-3.1-8B-Instruct" in means.caption
    ours = {tuple(line[:2]): list(line) for line in means.lines}
    assert ours["full", ""][-2:] == ["39.96", "+20.04"]
    assert ours["restkv@paper-longbench", "64"][-2:] == ["33.56", "+11.44"]  # 45 - 33.56
    assert ours["snapkv", "256"][-2:] == ["36.07", "-6.07"] and ours["snapkv", "256"][4].startswith("-30.00")
    assert list(asked.lines[0]) == ["hotpotqa", "own wording", "no", "100", "100", "1", "2"]


def test_published_figures_need_the_model_and_the_budget() -> None:
    assert published("longbench", ARGUMENTS)[0] == "Llama-3.1-8B-Instruct"
    assert published("longbench", {**ARGUMENTS, "model": "llama-2x64-float32-0"}) == ("", {})
    assert published("longbench", {**ARGUMENTS, "checkpoint": "recall-mini"}) == ("", {})
    for name, model in (
        ("Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("Llama-2-7b-chat-hf", "Llama-2-7B-Chat"),
    ):
        assert published("longbench", {**ARGUMENTS, "checkpoint": name})[0] == model  # as their folders are called
    assert published("infinitebench", ARGUMENTS) == ("", {})
    _, figures = published("ruler-official", ARGUMENTS)
    assert figures["restkv", 1024, 131072] == 68.28 and figures["full", None, 4096] == 99.34
    other = {**ARGUMENTS, "budgets": [100]}
    rows = rows_of(other, ["lcc"], dict.fromkeys(ARGUMENTS["methods"], 0.5))
    means = parts("longbench", other, rows)[1]
    assert isinstance(means, Table) and [line[-2] for line in means.lines] == ["39.96", "", ""]


def test_an_ablated_method_stands_beside_the_published_ablation_or_nothing() -> None:
    labels = [
        "full",
        "restkv@paper-longbench",
        "restkv@paper-longbench:alpha=none",
        "restkv@paper:alpha=0.5",
        "restkv@paper:window=16",
        "restkv",
    ]
    arguments = {**ARGUMENTS, "methods": labels, "budgets": [128]}
    means = parts("longbench", arguments, rows_of(arguments, ["lcc"], dict.fromkeys(labels, 0.5)))[1]
    assert isinstance(means, Table)
    assert {line[0]: line[-2] for line in means.lines} == dict(
        zip(labels, ["39.96", "35.86", "34.15", "35.51", "", ""], strict=True)
    )


MODELS = {  # in the specification's tables: of our own name, and in the shape that its configuration has
    "Llama-3.1-8B-Instruct": "llama-32x4096",
    "Llama-2-7B-Chat": "llama-32x4096",
    "Mistral-7B-Instruct-v0.3": "mistral-32x4096",
}


def test_published_figures_are_those_of_the_specification(shared: Path) -> None:
    """Read anew from its tables, cell by cell."""
    text = (shared / "SPEC.md").read_text(encoding="utf-8")
    methods = ["streamingllm", "h2o", "tova", "snapkv", "restkv"]
    for model, shape in MODELS.items():
        line = re.search(rf"^\| {re.escape(model)} \(([\d.]+)\) \|(.*)\|$", text, re.M)
        assert line is not None
        expected: dict[tuple[Any, ...], float] = {("full", None, None): float(line[1])}
        for method, cell in zip(methods, line[2].split("|"), strict=True):
            means = map(float, cell.split("/"))
            expected |= {(method, b, None): mean for b, mean in zip((64, 128, 256, 512, 1024), means, strict=True)}
        if model == "Llama-3.1-8B-Instruct":
            expected |= ablations(text)
        assert published("longbench", {"checkpoint": model, "model": f"{shape}-bfloat16-0"}) == (model, expected)
    (row,) = [line for line in text.splitlines() if line.startswith("Full 99.34/")]
    _, figures = published("ruler-official", ARGUMENTS)
    assert len(figures) == 5 * 6
    for name, values in re.findall(r"(\S+) ((?:\d+\.\d+/){6}\d+\.\d+)", row):
        *scores, average = map(float, values.split("/"))
        method, budget = name.lower().replace("-", ""), None if name == "Full" else 1024
        assert [figures[method, budget, 4096 << step] for step in range(6)] == scores
        assert sum(scores) / 6 == pytest.approx(average, abs=0.006)


def ablations(text: str) -> dict[tuple[Any, ...], float]:
    """fig_sensitivity in the specification: by alpha, the plain mean, by beta (our scale), plain averaging."""
    number = r"(\d+\.\d+)"
    alphas = re.search(rf"α 0\.1…0\.9: ((?:{number} ?){{9}})\(mean instead of EMA {number}\)", text)
    betas = re.search(rf"β ([\d,]+): ((?:{number} ?){{8}})\(plain avg-pool {number}\)", text)
    assert alphas is not None and betas is not None
    named = {f"alpha=0.{tenth}": value for tenth, value in enumerate(alphas[1].split(), 1)}
    named |= {f"scale={beta}": value for beta, value in zip(betas[1].split(","), betas[2].split(), strict=True)}
    named |= {"alpha=none": alphas[3], "pooling=avg": betas[4]}
    return {(f"restkv:{option}", 128, None): float(value) for option, value in named.items()}


@pytest.mark.parametrize("kind", ("longbench", "infinitebench", "ruler-official", "needle-official"))
def test_reports_show_a_run_of_every_benchmark(kind: str, finished: dict[str, Path]) -> None:
    pytest.importorskip("matplotlib")
    page, text, tex = build(finished[kind]), markdown(finished[kind]), latex(finished[kind])
    wording = "in the data files" if kind == "ruler-official" else "own wording"
    assert wording in page and wording in text and wording in tex
    assert "How it was asked" in page and "<img" in page and "| restkv:window=4 | 16 |" in text
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") >= 3 and r"restkv:window=4 & 16 & " in tex
    for line in tex.splitlines():
        assert line.startswith(("%", "\\")) or not line or line.endswith(r" \\")


def test_reports_of_a_published_model_show_its_figures(finished: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(finished["longbench"], tmp_path / "run")
    manifest = read_manifest(folder)
    manifest["arguments"] |= {name: ARGUMENTS[name] for name in ("checkpoint", "model")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for shown in (build(folder), markdown(folder), latex(folder)):
        assert "published for Llama-3.1-8B-Instruct" in shown and "39.96" in shown
    assert "39.96" not in markdown(finished["longbench"])


def test_a_table_in_latex_escapes_what_latex_reads(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "report", "--latex", str(finished["longbench"])]) == 0
    tex = capsys.readouterr().out
    assert r"multifieldqa\_en" in tex and r"[95 \%]" in tex and "multifieldqa_en &" not in tex


# -- parity


LONGEST = 90  # tokens of prompt


def test_the_full_cache_is_transformers_greedy_generation(stories260k: Path, tmp_path: Path) -> None:
    """20 rows of four tasks, some of them too long, token for token, and the same metric of the same text."""
    transformers = pytest.importorskip("transformers")
    from bench.published import wording
    from bench.published.longbench import METRICS as metrics

    lm = restkv.load(stories260k)
    tasks = ["hotpotqa", "triviaqa", "samsum", "lcc"]
    said = {"answers": ["She was very happy. She wanted to play with the big red ball in the park."]}
    for task in tasks:
        write_jsonl(tmp_path / "data" / f"{task}.jsonl", [longbench_row(task, number) | said for number in range(5)])
    data = tmp_path / "data"
    suite = longbench(lm, data, tasks, OFFICIAL, None)
    run(lm, Plan(suite, "stories260k", tuple(parse_methods("full")), (64,), max_length=LONGEST), tmp_path / "run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories260k, attn_implementation="eager")
    words = transformers.AutoTokenizer.from_pretrained(stories260k)
    rows = read_rows(tmp_path / "run")
    assert len(rows) == 20 and 4 <= sum(row["cut"] > 0 for row in rows) <= 16
    assert sum(row["score"] > 0 for row in rows) >= 8 and {row["ended"] for row in rows} == {"length", "eos"}
    for row in rows:
        line = (data / f"{row['task']}.jsonl").read_text(encoding="utf-8").splitlines()[row["index"]]
        prompt = wording.LONGBENCH[row["task"]].format(**json.loads(line))
        ids = words(prompt).input_ids
        if len(ids) > LONGEST:
            halves = ids[: LONGEST // 2], ids[-LONGEST // 2 :]
            prompt = "".join(words.decode(part, skip_special_tokens=True) for part in halves)
        ids = words(prompt, return_tensors="pt").input_ids
        metric, tokens = metrics[row["task"]]
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
        if row["task"] == "samsum":
            newline = words.encode("\n", add_special_tokens=False)[-1]
            options |= {"eos_token_id": [words.eos_token_id, newline], "min_length": ids.shape[1] + 1}
        with torch.no_grad():
            new = theirs.generate(ids, **options)[0, ids.shape[1] :]
        text = words.decode(new, skip_special_tokens=True)
        source = next(source for source in suite.sources if source.task.name == row["task"])
        ours, _, _ = encode(lm, source.item(row["index"]), source.task.chat, LONGEST)
        assert ours == ids[0].tolist()
        ends = options.get("eos_token_id", [words.eos_token_id])
        [(_, alone)] = answer_all(
            lm, [restkv.FullCache()], ours, Decoding(tokens), eos=ends, least_one="min_length" in options
        )
        assert alone.tokens == new.tolist()
        assert (row["output"], row["new_tokens"]) == (alone.text, len(new))
        assert row["output"].strip() == text.strip()
        assert row["score"] == round(metric(text, json.loads(line)["answers"], ()), 6)

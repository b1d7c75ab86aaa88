"""Runs of the published benchmarks: the public API's answers, runs that survive kill -9, commands and reports."""

from __future__ import annotations

import json
import os
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
from bench.published.longbench import longbench
from bench.published.run import Plan, answer, encode
from bench.published.suite import OFFICIAL, Item, Suite
from bench.report.kinds import progress
from bench.runs.folder import SAMPLES, TIMINGS, RunError, read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from bench.runs.together import answer_all
from make.official_files import (
    longbench_row,
    write_jsonl,
    write_longbench,
)
from make.official_runs import METHODS, plan, short
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.results import Decoding

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
    rows = [row.line() for row in answer(lm, every, source, 0)]
    ids = lm.encode(source.item(0).prompt)
    assert len(rows) == 1 + 3 * 2
    for cell, row in zip(every.cells, rows, strict=True):
        assert row["entries"] == {16: 16, 0.5: round(len(ids) / 2), 1.0: None}[cell.asked]
        alone = lm.generate(ids, cell.method.policy(row["entries"] or len(ids)), max_new_tokens=8)
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
    command = [sys.executable, "-m", "restkv", "bench", "longbench", *options, "--out", str(tmp_path / "killed")]
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


# -- parity


LONGEST = 90  # tokens of prompt


def test_the_full_cache_is_transformers_greedy_generation(stories260k: Path, tmp_path: Path) -> None:
    """20 rows of four tasks, some of them too long, token for token, and the same metric of the same text."""
    transformers = pytest.importorskip("transformers")
    from bench.published import wording
    from bench.published.longbench import TASKS as metrics

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
        metric, tokens, _ = metrics[row["task"]]
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

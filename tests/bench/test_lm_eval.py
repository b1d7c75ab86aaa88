"""The adapter for lm-evaluation-harness: equal to the harness's own `hf` model with the full cache, to LM.logprobs without.

Needs the extra `eval`, and accelerate for `hf`. No network: the tasks are written here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import restkv
from make.lm_eval_tasks import ANSWER, CHOICE, ROLLING, STORY, TASKS, TEXTS
from make.places import ROOT
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import OutputError, PolicyError, PromptError, RestKVWarning

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
pytest.importorskip("accelerate", reason="pip install accelerate, which lm-eval's hf model needs")
os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bench.harness import RestKVHarness
from bench.quality.anli import AnliPlan
from bench.runs.folder import read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tasks' files; the harness keeps its copies of the data there too."""
    folder = tmp_path_factory.mktemp("tasks")
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    choices = [["a dog", "the big red ball", "x"], ["48213.", "not here"], [" listen to his mom", "go"], ["tall", "12"]]
    contexts = [*TEXTS[:4], ""]
    rows = [
        {"text": text, "choices": some} for text, some in zip(contexts, [*choices, ["The end", "One"]], strict=True)
    ]
    lines: dict[str, list[dict[str, Any]]] = {
        "choice": rows,
        "rolling": [{"text": text} for text in [*TEXTS, STORY[:250]]],
        "answer": [{"text": t} for t in TEXTS],
    }
    for name, docs in lines.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, docs)))
    return folder


@pytest.fixture(scope="module")
def evaluate(folder):
    """evaluate(model, tasks, ...): the responses of every sample, by task."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, tasks=TASKS, **options):
        done = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
        return {task: [sample["resps"] for sample in done["samples"][task]] for task in tasks}

    return run


@pytest.fixture(scope="module", params=["stories260k", "recall-mini"])
def checkpoint(request) -> Path:
    return RECALL if request.param == "recall-mini" else request.getfixturevalue("stories260k")


def ours(checkpoint=RECALL, **options):
    return RestKVHarness(str(checkpoint), **options)


def asks(*pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def numbers(responses):
    """Log-likelihoods and greedy flags, each in one list, of a task's responses in order."""
    flat = [resp for sample in responses for choice in sample for resp in choice]
    return [r[0] if isinstance(r, tuple) else r for r in flat], [r[1] for r in flat if isinstance(r, tuple)]


# -- the full cache is `hf`


@pytest.mark.parametrize("max_length", [None, 48], ids=["whole", "truncated"])
def test_the_full_cache_gives_what_hf_gives(checkpoint, max_length, evaluate):
    # In larger batches `hf` decides by the first text whether all of them get a BOS.
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=1, max_length=max_length)
    want = evaluate(theirs)
    for batch_size in (1, 3):
        model = ours(checkpoint, method="full", dtype="float32", batch_size=batch_size, max_length=max_length)
        got = evaluate(model)
        for task in TASKS[:2]:
            (have, flags), (reference, their_flags) = numbers(got[task]), numbers(want[task])
            assert have == pytest.approx(reference, abs=1e-4)
            assert flags == their_flags
        assert got["tiny_answer"] == want["tiny_answer"]
    assert model.max_length == theirs.max_length
    assert any(text[0][0] for text in want["tiny_answer"])


def test_pairs_are_encoded_as_by_hf(checkpoint):
    """Spaces at the end of a context, words cut in two, BOS written out, no context at all, and none but a BOS."""
    # Its logits_cache mixes up pairs that are the same tokens cut at different places, as two of these are.
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", logits_cache=False)
    model = ours(checkpoint, method="full", dtype="float32")
    pairs = [
        ("Lily ran  ", "home."),
        ("Li", "ly ran"),
        ("<s>Lily", " ran"),
        ("", "Lily ran"),
        ("", "<s>Lily"),
        (" ", "a"),
    ]
    assert model.prefix_token_id == theirs.prefix_token_id and model.eot_token_id == theirs.eot_token_id
    for context, continuation in pairs[:3]:
        assert model._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)
    have, want = model.loglikelihood(asks(*pairs)), theirs.loglikelihood(asks(*pairs))
    assert [h[0] for h in have] == pytest.approx([w[0] for w in want], abs=1e-4)
    assert [h[1] for h in have] == [w[1] for w in want]


def test_a_chat_is_written_as_by_hf(tmp_path):
    for file in RECALL.iterdir():
        shutil.copy(file, tmp_path)
    settings = json.loads((RECALL / "tokenizer_config.json").read_text())
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    model, theirs = ours(tmp_path), HFLM(str(tmp_path), device="cpu")
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was"}]
    for prompt in (True, False):
        text = model.apply_chat_template(chat, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompt)
        assert model.tok_encode(text) == theirs.tok_encode(text)
    assert model.chat_template(True) == theirs.chat_template(True) == template
    with pytest.raises(PromptError, match="'other' cannot be chosen"):
        model.chat_template("other")
    template = template.replace("[assistant]", "{{ 'no ' if enable_thinking is false }}[assistant]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert ours(tmp_path, template_args=given).apply_chat_template(chat[:1]).endswith("no [assistant]")
    with pytest.raises(PromptError, match="template_args '3': give a JSON object"):
        ours(tmp_path, template_args="3")


def test_our_anli_with_the_full_cache_is_lm_evals_with_hf(checkpoint, tmp_path):
    """Its own ANLI task, prompt and all, on rows written here: log-likelihoods of all choices, and the accuracy."""
    import lm_eval.tasks
    import yaml

    labels = "enc"
    rows = [
        {"uid": str(index), "premise": text, "hypothesis": f"Lily saw {what}.", "label": labels[index % 3]}
        for index, (text, what) in enumerate(zip(TEXTS, ["a dog", "48213", "Tim", "the tree", "it"], strict=True))
        if not text.startswith("<s>")  # a BOS of its own: `hf` doubles it
    ]
    task = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "anli" / "anli_r1.yaml").read_text())
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "anli.json")}}}
    task |= {"task": "local_anli", "tag": [], "test_split": "test", **data}
    for name in ("dataset_name", "training_split", "validation_split"):
        del task[name]
    (tmp_path / "local_anli.yaml").write_text(yaml.safe_dump(task))
    numbered = [{**row, "label": labels.index(row["label"])} for row in rows]
    (tmp_path / "anli.json").write_text("\n".join(map(json.dumps, numbered)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    done = simple_evaluate(theirs, tasks=["local_anli"], task_manager=manager, bootstrap_iters=0)
    want = [[resp[0][0] for resp in sample["resps"]] for sample in done["samples"]["local_anli"]]

    folder = tmp_path / "R1"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = restkv.load(checkpoint, dtype="float32")
    run(lm, AnliPlan(tmp_path, tuple(parse_methods("full")), (0.5,), rounds=(1,)), tmp_path / "run")
    for mode in ("aware", "agnostic"):
        ours = [row for row in read_rows(tmp_path / "run") if row["question"] == mode]
        # float32 itself is 2e-4 off float64 in choices of 46 nats.
        assert [row["logprobs"] for row in ours] == [pytest.approx(line, rel=1e-5, abs=1e-4) for line in want]
        accuracy = sum(row["score"] for row in ours) / len(ours)
        assert accuracy == pytest.approx(done["results"]["local_anli"]["acc,none"])


# -- a policy that evicts

METHODS = [
    "restkv",
    "snapkv:granularity=query",
    "h2o:interval=1",
    "streamingllm:sinks=2",
    "restkv:interval=none:budget_by=global",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [16, 0.3])
def test_continuations_are_scored_on_the_evicted_cache(method, budget):
    options = {"window": 8, "budget": budget}
    alone, together = (ours(method=method, batch_size=size, dtype=torch.float64, **options) for size in (1, 4))
    pairs = [(context, end) for context in TEXTS for end in (" the ball.", " 48213", " and then he was gone.")]
    got = together.loglikelihood(asks(*pairs))
    want = []
    for pair in pairs:
        context, continuation = together._encode_pair(*pair)
        want += together.lm.logprobs(context, [continuation], together.policy)
    assert [score for score, _ in got] == pytest.approx(want, abs=1e-4)
    for (score, greedy), (other, also) in zip(got, alone.loglikelihood(asks(*pairs)), strict=True):
        assert score == pytest.approx(other, abs=1e-4) and greedy == also
    full = ours(method="full").loglikelihood(asks(*pairs))
    assert max(abs(score - other) for (score, _), (other, _) in zip(got, full, strict=True)) > 0.01
    kept = together.get_model_info()["kept"]["loglikelihood"]
    assert kept["requests"] == len(TEXTS) and kept["kept"] < 0.8 * kept["seen"]
    json.dumps(together.get_model_info())


def test_continuations_of_a_context_share_its_prefill(monkeypatch):
    from restkv.session import Session

    prompts = []
    prefill = Session.prefill

    def noting(self, rows, *more):
        prompts.extend(rows)
        return prefill(self, rows, *more)

    monkeypatch.setattr(Session, "prefill", noting)
    model = ours(budget=16, window=8, batch_size=2)
    model.loglikelihood(asks(*[(context, end) for end in (" a", " the ball", " 12") for context in TEXTS[:3]]))
    assert sorted(map(len, prompts)) == sorted(len(model.tok_encode(text)) for text in TEXTS[:3])


def test_rolling_evicts_as_it_reads():
    # float64: an eviction that rounding decides otherwise would show in all tokens after it.
    model = ours(budget=16, window=8, interval=4, max_length=100, batch_size=2, dtype=torch.float64)
    got = model.loglikelihood_rolling(asks((STORY,), (TEXTS[1],), kind="loglikelihood_rolling"))
    want = []
    for text in (STORY, TEXTS[1]):
        ids, total, start = model.tok_encode(text), 0.0, 0
        for end in range(100, len(ids) + 100, 100):
            end = min(end, len(ids))
            first = max(0, end - 100)  # the last window reaches back, so that it is full too
            context = [model.prefix_token_id, *ids][first : start + 1]
            total += model.lm.logprobs(context, [ids[start:end]], model.policy)[0]
            start = end
        want.append(total)
    assert got == pytest.approx(want, abs=1e-4)
    full = ours(method="full", max_length=100).loglikelihood_rolling(asks((STORY,), kind="loglikelihood_rolling"))
    assert abs(full[0] - got[0]) > 1


def test_a_fraction_is_one_of_the_window_when_rolling():
    request = asks((TEXTS[1],), kind="loglikelihood_rolling")
    tokens = len(ours().tok_encode(TEXTS[1])) + 1
    entries = ours(budget=round(0.5 * tokens), window=4, interval=4).loglikelihood_rolling(request)
    assert ours(budget=0.5, window=4, interval=4).loglikelihood_rolling(request) == pytest.approx(entries, abs=1e-6)


def test_answers_are_those_of_the_policy(evaluate):
    options = {"budget": 16, "window": 8, "interval": 4}
    model = ours(batch_size=3, max_length=60, **options)
    [*answers] = evaluate(model, ["tiny_answer"])["tiny_answer"]
    for text, [[answer]] in zip(TEXTS, answers, strict=True):
        ids = model.tok_encode(text)[-20:]  # 40 of 60 are for the answer
        alone = model.lm.generate(ids, model.policy, max_new_tokens=40, stop=[".", " the "])
        assert answer == alone.text
    drawn = [{"until": ["."], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}] * 2
    request = asks(*zip(TEXTS[:2], drawn, strict=True), kind="generate_until")
    torch.manual_seed(3)
    first = model.generate_until(request)
    torch.manual_seed(3)
    assert model.generate_until(request) == first


def test_nothing_evicted_is_said():
    with pytest.warns(RestKVWarning, match="restkv with budget 900 evicted nothing in 1 requests"):
        ours(budget=900).loglikelihood(asks((TEXTS[0], " a ball")))
    with pytest.warns(RestKVWarning, match="no interval"):
        ours(budget=32, interval="none").loglikelihood_rolling(asks((STORY,), kind="loglikelihood_rolling"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestKVWarning)
        ours(method="full").loglikelihood(asks((TEXTS[0], " a ball")))
        ours(budget=16, window=8).loglikelihood(asks((TEXTS[0], " a ball")))


# -- arguments and errors


def test_arguments_arrive_as_the_command_line_means_them():
    model = RestKVHarness.create_from_arg_string(
        "method=restkv@paper-ruler:alpha=0.5,budget=0.25,window=8,interval=none,kernel_size=3,batch_size=4,max_length=99",
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )
    assert model.policy == restkv.policies.get_policy(
        "restkv", "paper-ruler", budget=0.25, window=8, interval=None, kernel_size=3, alpha=0.5
    )
    assert (model.batch_size, model.max_length) == (4, 99)
    layers = RestKVHarness.create_from_arg_obj({"budget": [64] * 4, "protect": [[0, 4]]}, {"device": "cuda:0"})
    assert layers.policy.budget == (64,) * 4 and layers.policy.protect == ((0, 4),)
    assert layers.policy.interval == 128 and ours().policy.budget == 1024


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"method": "restvk"}, PolicyError, "method 'restvk' is unknown; choose from restkv, snapkv"),
        ({"budget": 16}, PolicyError, "restkv: budget 16: window (32) + sinks (0) are always kept; give at least 32"),
        ({"budget": 64, "sinkz": 3}, PolicyError, "restkv: option 'sinkz' is unknown; it takes budget"),
        ({"preset": "none-such"}, PolicyError, "preset 'none-such' is unknown"),
        ({"method": "restkv@paper-ruler", "preset": "paper-ruler"}, PromptError, "name a preset each"),
        ({"prefill": "sparse"}, PromptError, "prefill 'sparse' is not known; give dense, chunked, flexprefill"),
        ({"batch_size": "auto"}, PromptError, "batch_size 'auto': give a whole number of at least 1"),
        ({"max_length": 0}, PromptError, "max_length 0: give a whole number of at least 1"),
        ({"device": "cuda:9"}, PromptError, "device 'cuda:9' is not available here"),
    ],
)
def test_wrong_arguments_are_one_line(options, kind, words):
    with pytest.raises(kind) as caught:
        ours(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_requests_are_one_line():
    model = ours(max_length=30, budget=16, window=8)
    with pytest.raises(PromptError, match="a continuation of 0 tokens, '', cannot be scored"):
        model.loglikelihood(asks(("Anna", "")))
    with pytest.raises(PromptError, match="it must have 1 to max_length=30"):
        model.loglikelihood(asks(("Anna", STORY)))
    with pytest.raises(PromptError, match="max_gen_toks=30 leaves no room for a context in max_length=30"):
        model.generate_until(asks(("Anna", {"max_gen_toks": 30}), kind="generate_until"))
    with pytest.raises(PromptError, match=r"repetition_penalty=1\.2 is not supported; restkv knows until"):
        model.generate_until(asks(("Anna", {"repetition_penalty": 1.2}), kind="generate_until"))


# -- the commands


def test_the_entry_point_is_the_model_type():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert {name: EntryPoint(name, place, "lm_eval.models").load() for name, place in points.items()} == {
        "restkv": RestKVHarness
    }
    assert get_model("restkv") is RestKVHarness


def test_a_broken_run_goes_on_from_its_cache_file(tmp_path, evaluate, monkeypatch):
    import bench.harness

    file, calls, real = str(tmp_path / "results"), [], bench.harness.score_rows

    def score(*given):
        calls.append(given[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    options = {"budget": 16, "window": 8}
    want = evaluate(ours(**options), ["tiny_choice"])
    monkeypatch.setattr(bench.harness, "score_rows", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate(ours(**options), ["tiny_choice"], use_cache=file)
    del calls[:2]
    (unfinished,) = calls
    calls[:] = [None] * 3
    got = evaluate(ours(**options), ["tiny_choice"], use_cache=file)
    assert numbers(got["tiny_choice"]) == numbers(want["tiny_choice"])
    assert calls[3] == unfinished and len(calls) == 6, "five contexts, of which two were done"
    with pytest.raises(OutputError, match="--use_cache: the file holds results of another model or policy"):
        evaluate(ours(budget=17, window=8), ["tiny_choice"], use_cache=file)


def test_the_command_runs_a_task(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    arguments = f"--tasks tiny_choice --include_path {folder} --output_path {tmp_path} --batch_size 2"
    assert main(["bench", "lm-eval", "--model_args", "method=snapkv,budget=16,window=8", *arguments.split()]) == 0
    shown = capsys.readouterr().out
    assert "restkv ({'method': 'snapkv', 'budget': 16, 'window': 8})" in shown and "|tiny_choice|" in shown
    (results,) = tmp_path.rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["policy"]["name"] == "snapkv" and config["kept"]["loglikelihood"]["requests"] == 5

    assert main(["bench", "lm-eval", "--model_args", "method=snapkv,budget=8", *arguments.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == "restkv: error: snapkv: budget 8: window (32) + sinks (0) are always kept; give at least 32 or lower them"
    )


@pytest.mark.slow
def test_the_page(tmp_path):
    """docs/lm-eval.md as it stands, in processes of its own: shell, then Python."""
    text = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    (shell,), (code,) = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S) for kind in ("bash", "python"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "restkv").write_text(f'#!/bin/sh\nexec {sys.executable} -m restkv "$@"\n')
    (tmp_path / "bin" / "restkv").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
    }
    for command in (["bash", "-euo", "pipefail", "-c", shell], [sys.executable, "-c", code]):
        ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "|codes|" in ran.stdout or "'requests': 2" in ran.stdout
    assert list((tmp_path / "codes" / "results").rglob("samples_codes_*.jsonl"))

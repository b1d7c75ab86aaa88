"""Which jobs are compiled, and where their kernels stay."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_ids, small_model

from restkv import compiling
from restkv.compiling import COLD, EAGER_TOKENS, GAIN, WARM, Mark, keep_kernels, repays
from restkv.errors import PromptError
from restkv.generate import Engine, Session
from restkv.lm import LM
from restkv.policies import H2O, ReSTKV, SnapKV
from restkv.warmup import warm_up

POLICY = ReSTKV(budget=20, window=4, interval=8)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A user without kernels: XDG_CACHE_HOME is this folder, and nothing else says where they go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what a test sets is undone
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path


def test_kernels_go_to_the_users_cache_folder(nowhere):
    assert keep_kernels() == nowhere / "restkv" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(nowhere / "restkv" / "inductor")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == str(nowhere / "restkv" / "inductor")


def test_a_folder_named_by_the_user_wins(nowhere, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(nowhere / "mine"))
    assert keep_kernels() == nowhere / "mine"
    assert not (nowhere / "restkv").exists()


def test_a_cache_folder_that_cannot_be_made_leaves_inductors_default(nowhere, monkeypatch):
    (nowhere / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "file"))
    assert keep_kernels() is None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    mark = Mark(small_model(), _cache())
    mark.leave()
    assert not mark.stands


def _cache(rows: int = 1, policy=POLICY):
    return Session(Engine(small_model(), "sdpa"), policy, [30] * rows, 10).cache


def test_a_step_is_known_by_its_shapes(nowhere):
    model = small_model()
    Mark(model, _cache()).leave()
    assert Mark(model, _cache()).stands
    assert not Mark(model, _cache(rows=2)).stands
    assert not Mark(model, _cache(policy=ReSTKV(budget=200, window=4, interval=8))).stands
    assert not Mark(model.to(torch.bfloat16), _cache()).stands


@pytest.mark.parametrize(("warm", "cost"), [(False, COLD), (True, WARM)])
def test_compiling_repays_when_it_saves_more_than_it_takes(warm, cost):
    tokens = 1000
    lap = cost / (GAIN * tokens)
    assert repays(1.01 * lap, tokens, warm) and not repays(0.99 * lap, tokens, warm)


def test_a_long_answer_goes_on_compiled(monkeypatch):
    asked = []

    def always(lap, tokens, warm):
        asked.append((tokens, warm))
        return True

    monkeypatch.setattr("restkv.lm.repays", always)
    torch._dynamo.reset()
    prompts = [small_ids(33), small_ids(5, seed=1)]
    eager = LM(small_model(group=3, head_dim=16), None).generate(prompts, POLICY, max_new_tokens=40)
    lm = LM(small_model(group=3, head_dim=16), None, by_job=True)
    first, again = (lm.generate(prompts, POLICY, max_new_tokens=40) for _ in range(2))
    for rows in (first, again):
        assert [row.tokens for row in rows] == [row.tokens for row in eager]
        assert rows[0].stats.kept == eager[0].stats.kept
    assert (first[0].stats.graphs, again[0].stats.graphs) == (1, 0)
    # By the second answer the kernels of the first were known to be there (before it, if an earlier run has left them).
    assert [tokens for tokens, _ in asked] == [40 - EAGER_TOKENS - 1] * 2 and asked[1][1]
    assert lm.backend == "sdpa" and eager[0].stats.graphs == 0
    torch._dynamo.reset()


WITHOUT_COMPILER = """
import sys, warnings
import torch
from small import small_ids, small_model
from restkv.errors import CompileError
from restkv.lm import LM
from restkv.policies import ReSTKV
import restkv.lm

restkv.lm.repays = lambda *_: True
policy = ReSTKV(budget=20, window=4, interval=8)
model, ids = small_model(group=3, head_dim=16), small_ids(33)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    lm = LM(model, None, by_job=True)
    said = [lm.generate(ids, policy, max_new_tokens=30) for _ in range(2)]
told = [str(one.message) for one in seen if "compiled" in str(one.message)]
assert len(told) == 1 and "there is no working C++ compiler (g++)" in told[0] and "\\n" not in told[0], told  # tried once
want = LM(model, None).generate(ids, policy, max_new_tokens=30)
assert [one.tokens for one in said] == [want.tokens] * 2 and said[0].stats.kept == want.stats.kept
try:
    LM(model, None, "flex").generate(ids, policy, max_new_tokens=3)
except CompileError as error:
    assert "'decode' cannot be compiled here: there is no working C++ compiler (g++)" in str(error), error
else:
    raise AssertionError("compiled without a compiler")
"""


def test_without_a_compiler_an_answer_goes_on_as_it_began(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    environment.pop("CXX", None)
    ran = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_short_answers_and_fixed_backends_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("restkv.lm.repays", lambda *_: True)
    ids = small_ids(20)
    for lm, count in ((LM(small_model(), None, by_job=True), EAGER_TOKENS), (LM(small_model(), None), 40)):
        assert lm.generate(ids, POLICY, max_new_tokens=count).stats.graphs == 0
    assert compiling.repays(0.002, 128, False) is False  # a small model on a CPU: nothing to be gained


def test_warming_up_leaves_nothing_to_compile():
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16), None, "flex")
    warmed = warm_up(lm, POLICY, prompt_tokens=17, max_new_tokens=9, rows=2)
    assert warmed.graphs == 1 and min(warmed.prefill_s, warmed.first_s, warmed.next_s) > 0
    said = lm.generate([small_ids(60), small_ids(3, seed=1)], POLICY, max_new_tokens=30)
    assert said[0].stats.graphs == 0
    torch._dynamo.reset()


@pytest.mark.parametrize(("options", "words"), [({"rows": 0}, "rows 0"), ({"prompt_tokens": 0}, "prompt_tokens 0")])
def test_warming_up_refuses_what_makes_no_sense(options, words):
    job = {"prompt_tokens": 4, "max_new_tokens": 4} | options
    with pytest.raises(PromptError, match=words):
        warm_up(LM(small_model(), None, "flex"), POLICY, **job)
    with pytest.raises(PromptError, match="compiles nothing"):
        warm_up(LM(small_model(), None, "sdpa"), POLICY, 4, 4)


@pytest.mark.slow
def test_fifty_prompts_under_three_policies_compile_one_graph_each():
    """Prompts shorter and longer than the budget; evicted as they grow, at every step, or once."""
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16), None, "flex")
    draw = random.Random(0)
    policies = [POLICY, H2O(budget=20, recent=4), SnapKV(budget=24, window=4, interval=None)]
    for policy in policies:
        assert lm.generate(small_ids(40), policy, max_new_tokens=12).stats.graphs == 1
    for index in range(50):
        ids = small_ids(draw.randint(1, 300), seed=index)
        assert lm.generate(ids, policies[index % 3], max_new_tokens=12).stats.graphs == 0
    torch._dynamo.reset()

"""A prompt that is scored in compiled pieces: the eager twin's scores, one graph, and only where it pays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from torch import Tensor

from make.small import small_ids, small_model
from modeling.errors import CompileError, RestKVWarning
from restkv import pieces
from restkv.engine import Engine
from restkv.evict import Evictor
from restkv.lm import LM
from restkv.observe import Observation
from restkv.pieces import Pieces
from restkv.policies import PyramidKV, ReSTKV, SnapKV
from restkv.session import Session
from restkv.warmup import warm_up

PIECE = 64
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema, largest of a group": {"alpha": 0.3, "gqa": "max", "tau": 2.0},
    "no output weight": {"output_weight": False, "budget_by": "uniform"},
    "indicator": {"aggregate": "indicator", "normalize": True},
    "joint": {"gqa": "joint", "budget_by": "adakv"},
    "joint indicator": {"gqa": "joint", "aggregate": "indicator"},
    "query": {"granularity": "query", "pooling": "avg"},
}
POLICY = {name: ReSTKV(24, window=5, interval=8, **options) for name, options in FORMS.items()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", PIECE)


def observation(policy: ReSTKV, length: int, seed: int) -> Observation:
    """What an eviction after a random prompt of a small model's layer sees."""
    model, generator = small_model(group=3, head_dim=16), torch.Generator().manual_seed(seed)
    evictor, observed = (
        Evictor(model, policy, Engine(model, "sdpa").roots, [length]),
        min(policy.observed_prompt, length),
    )
    q, k, v = (
        torch.randn(1, heads, tokens, 16, generator=generator)
        for heads, tokens in ((6, observed), (2, length), (2, length))
    )
    return evictor._observation(
        0,
        q=q,
        q_pos=torch.arange(length - observed, length)[None],
        k=k,
        v=v,
        pos=torch.arange(length).expand(1, 2, length),
        budgets=[24],
        next_pos_B=torch.tensor([length]),
    )


def agree(policy: ReSTKV, obs: Observation, run: Callable[..., Tensor]) -> None:
    want, got = policy.score(obs), policy.score(replace(obs, run=run))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert torch.equal(policy.keep(replace(obs, run=run)), policy.keep(obs))


@pytest.mark.parametrize("name", POLICY)
def test_pieces_score_as_the_eager_twin(name):
    widths = set()

    def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        widths.add(tuple((one.shape, one.stride()) for one in arguments if isinstance(one, Tensor)))
        return function(*arguments)

    @settings(max_examples=25, deadline=None, database=None)
    @drawn(length=st.integers(PIECE, 6 * PIECE), seed=st.integers(0, 99))
    def compare(length: int, seed: int) -> None:
        agree(POLICY[name], observation(POLICY[name], length, seed), run)

    with torch.no_grad():
        compare()
    assert len(widths) == 1  # of prompts of all lengths


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY)
def test_compiled_pieces_are_one_graph(name):
    torch._dynamo.reset()
    run, graphs = Pieces(True), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with torch.no_grad():
        for length in (PIECE, 100, 3 * PIECE, 311, 500):
            agree(POLICY[name], observation(POLICY[name], length, length), run)
    assert graphs["unique_graphs"] - before == 1 and run.possible
    torch._dynamo.reset()


def test_compiling_waits_until_it_pays(monkeypatch):
    monkeypatch.setattr(pieces, "PAYS_AFTER", 1000)
    run = Pieces(True)
    assert [run.pay(PIECE - 1, 99), run.pay(PIECE, 0), run.pay(PIECE, 10), run.pay(PIECE, 10)] == [False] * 2 + [
        False,
        True,
    ]
    assert not Pieces(False).pay(PIECE, 10_000)
    run = Pieces(True)
    run.asked = True
    assert run.pay(PIECE, 1) and not run.pay(PIECE - 1, 1)


def made(calls: list[int], fails: bool = False) -> Callable[..., Any]:
    """A compiler that compiles nothing."""

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            calls.append(1)
            if fails:
                raise CompileError("there is no compiler")
            return function(*arguments)

        return call

    return compiled


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        (POLICY["mean"], "compiled"),
        (SnapKV(24, window=5), "eager"),
        (PyramidKV(24, window=5), "eager"),
        (ReSTKV(24, window=5, probe="prompt"), "eager"),
        (ReSTKV(400, window=5), ""),
    ],
)
def test_answers_say_how_prompts_were_scored(policy, how, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(pieces, "compiled", made(calls))
    eager, compiling = LM(small_model(), None), LM(small_model(), None, "flex")
    compiling.engine.pieces.asked = True
    said = [lm.generate(small_ids(200), policy, max_new_tokens=1) for lm in (eager, compiling)]
    assert (said[0].stats.scores, said[1].stats.scores) == (how and "eager", how)
    assert said[0].tokens == said[1].tokens and said[0].stats.kept == said[1].stats.kept
    assert bool(calls) == (how == "compiled")


def test_what_cannot_be_compiled_is_said_once(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(pieces, "compiled", made(calls, fails=True))
    engine = Engine(small_model(), "flex")
    engine.pieces.asked = True
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            session = Session(engine, POLICY["mean"], [200], 1)
            session.prefill([small_ids(200)])
    told = [str(one.message) for one in seen if one.category is RestKVWarning]
    assert told == ["there is no compiler. Prompts are scored eagerly from now on"] and len(calls) == 1
    assert session.evictor.scored == {"eager"}


@pytest.mark.parametrize(("length", "asked"), [(PIECE - 1, False), (200, True)])
def test_warming_up_asks_for_the_graph_of_long_prompts(length, asked, monkeypatch):
    lm = LM(small_model(), None, "flex")
    monkeypatch.setattr(pieces, "compiled", made([]))
    monkeypatch.setattr(lm.engine, "decode", lambda *_: torch.zeros(1, 23))
    monkeypatch.setattr(lm.engine, "evict", lambda *_: None)
    warm_up(lm, POLICY["mean"], length, 2)
    assert lm.engine.pieces.asked == asked

"""Log-probabilities of continuations: against dense logits, on forks, compiled.

Letters: L prompt length, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

import restkv
from make.small import small_ids, small_lm
from modeling.pool import PagePool
from restkv.lm import LM
from restkv.policies import H2O, FullCache, ReSTKV, SnapKV, StreamingLLM
from restkv.session import Session

PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def lm(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


def test_logprobs_are_those_of_the_dense_logits(lm):
    context = lm.tokenizer.encode(PROMPT)
    continuations = [" She loved to play", [5, 6, 7, 8, 9], "!"]
    got = lm.logprobs(context, continuations)
    for continuation, value in zip(continuations, got, strict=True):
        ids = lm.encode_continuation(continuation)
        logp_LV = lm.logits(context + ids).double().log_softmax(-1)
        want = sum(float(logp_LV[len(context) - 1 + i, token]) for i, token in enumerate(ids))
        assert value == pytest.approx(want, abs=1e-4)
    assert got[0] > got[1]


@pytest.mark.parametrize(
    "policy", [ReSTKV(budget=10, window=4, interval=3), H2O(budget=10, recent=4), StreamingLLM(budget=10)]
)
def test_logprobs_of_a_compressed_context_do_not_depend_on_the_other_continuations(policy):
    lm, context = small_lm(), small_ids(33)
    continuations = [small_ids(length, seed=length) for length in (12, 1, 7)]
    together = lm.logprobs(context, continuations, policy)
    assert together == [lm.logprobs(context, [ids], policy)[0] for ids in continuations]
    assert together[::-1] == lm.logprobs(context, continuations[::-1], policy)
    session = Session(lm.engine, policy, [len(context)], 12)
    session.prefill([context])
    total = 0.0
    for token in continuations[0]:
        total += float(session.logits_BV[0].log_softmax(-1)[token])
        session.feed(torch.tensor([token]))
    assert together[0] == pytest.approx(total, abs=1e-5)
    assert together[0] != lm.logprobs(context, continuations[:1])[0]


@pytest.mark.parametrize("length", [63, 64, 200])
@pytest.mark.parametrize(
    "policy",
    [
        FullCache(),
        ReSTKV(budget=40, window=4, interval=3),
        ReSTKV(budget=40, window=4, interval=3, budget_by="global"),
        SnapKV(budget=40, window=4, interval=None),
        H2O(budget=40, granularity="query"),
    ],
    ids=lambda policy: f"{policy.name}-{policy.interval}-{policy.allocation.name}",
)
def test_forks_of_logprobs_find_pages_ready(policy, length, monkeypatch):
    """However long the continuations: a pool that grows is a new graph."""
    lm = small_lm()
    monkeypatch.setattr(PagePool, "grow", lambda pool, count: pytest.fail(f"{count} more pages"))
    lm.logprobs(small_ids(length), [small_ids(70), small_ids(3), small_ids(40)], policy)


def test_a_row_that_has_ended_is_judged_like_one_that_goes_on():
    lm = small_lm()
    sessions = [Session(lm.engine, ReSTKV(budget=20, window=4), [30], 8) for _ in range(2)]
    for session in sessions:
        session.prefill([small_ids(30)])
    sessions[1].finish(0)
    going_on, ended = (lm.score(session, [small_ids(6), small_ids(3)]) for session in sessions)
    assert going_on == ended


@pytest.mark.slow
def test_logprobs_compile_one_graph():
    torch._dynamo.reset()
    lm, counted = small_lm("flex"), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    lm.logprobs(small_ids(63), [small_ids(7), small_ids(1), small_ids(40)])
    assert counted["unique_graphs"] - before == 1
    torch._dynamo.reset()

"""Teacher forcing in batches against LM.logprobs, which does one continuation of one context at a time."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality.teacher_forcing import Tally, score_rows, score_unevicted
from make.small import VOCAB, small_ids, small_model
from restkv.cli import main
from restkv.lm import LM
from restkv.policies import H2O, FullCache, LaCache, Policy, PyramidKV, ReSTKV, SnapKV, StreamingLLM

LMS = [LM(small_model(), None), LM(small_model(1, windows=(12, None)), None)]
POLICIES: list[Policy] = [
    FullCache(),
    ReSTKV(budget=12, window=4, interval=3),
    ReSTKV(budget=0.4, window=4, interval=None, budget_by="global"),
    SnapKV(budget=10, window=4, granularity="query", interval=5),
    PyramidKV(budget=12, window=4, interval=4),
    H2O(budget=12, window=4, interval=1),
    StreamingLLM(budget=12, window=8, sinks=2, interval=1),
    LaCache(budget=16, window=4, interval=4),
]


@settings(max_examples=20)
@given(
    st.sampled_from(LMS),
    st.sampled_from(POLICIES),
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    st.integers(0, 1000),
)
def test_a_row_of_a_batch_scores_as_it_does_alone(lm, policy, shape, seed):
    contexts = [small_ids(length, seed + row) for row, (length, _) in enumerate(shape)]
    continuations = [
        [small_ids(length, seed + 7 * row + place) for place, length in enumerate(lengths)]
        for row, (_, lengths) in enumerate(shape)
    ]
    tally = Tally()
    scores = score_rows(lm, policy, contexts, continuations, tally=tally)
    for context, targets, row in zip(contexts, continuations, scores, strict=True):
        assert [score.logprob for score in row] == pytest.approx(lm.logprobs(context, targets, policy), abs=1e-4)
    longest = [max(map(len, targets)) for targets in continuations]
    assert tally.requests == len(shape)
    assert tally.seen == sum(map(len, contexts)) + sum(longest) - len(shape)  # the last token of a text is never fed
    assert 0 < tally.kept <= tally.seen


@settings(max_examples=10)
@given(st.sampled_from(LMS), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_one_pass_is_the_full_cache_token_by_token(lm, context, continuation, seed):
    ids, target = small_ids(context, seed), small_ids(continuation, seed + 1)
    [[slow]] = score_rows(lm, FullCache(), [ids], [[target]])
    fast = score_unevicted(lm, ids, target)
    assert fast.logprob == pytest.approx(slow.logprob, abs=1e-4)
    assert fast.greedy == slow.greedy


@settings(max_examples=20)
@given(
    st.sampled_from(LMS),
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_answers_of_one_token_are_scored_as_on_forks(lm, policy, shape, seed):
    contexts = [small_ids(length, seed + row) for row, (length, _) in enumerate(shape)]
    choices = [[small_ids(1, seed + 7 * row + place) for place in range(count)] for row, (_, count) in enumerate(shape)]
    at_once = score_rows(lm, policy, contexts, choices)
    on_forks = score_rows(lm, policy, contexts, choices, tally=Tally())
    for mine, theirs in zip(at_once, on_forks, strict=True):
        assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in theirs], abs=1e-6)
        assert [one.greedy for one in mine] == [one.greedy for one in theirs]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_greedy_is_what_generation_says(policy):
    lm, context = LMS[0], small_ids(30, 3)
    answer = lm.generate(context, policy, max_new_tokens=8, ignore_eos=True).tokens
    wrong = [[*answer[:at], (answer[at] + 1) % VOCAB, *answer[at + 1 :]] for at in range(8)]
    [scores] = score_rows(lm, policy, [context], [[answer, *wrong]])
    assert [score.greedy for score in scores] == [True] + [False] * 8


def test_a_chunked_prefill_evicts_between_chunks():
    lm, policy, context, target = LMS[0], ReSTKV(budget=12, window=4, interval=3), small_ids(1300, 5), small_ids(6, 6)
    compressed = lm.compress(context, policy, prefill="chunked")
    [[score]] = score_rows(lm, policy, [context], [[target]], "chunked")
    assert score.logprob == pytest.approx(compressed.logprobs([target])[0], abs=1e-4)
    [[dense]] = score_rows(lm, policy, [context], [[target]])
    assert abs(dense.logprob - score.logprob) > 1e-3, "otherwise this test cannot tell the two apart"


def test_what_was_kept_is_counted():
    lm, tally = LMS[0], Tally()
    score_rows(lm, ReSTKV(budget=12, window=4, interval=4), [small_ids(20)], [[small_ids(7)]], tally=tally)
    # 20 tokens become 12; of the 6 that are fed the fourth makes 16 and evicts, two more follow.
    assert tally == Tally(requests=1, seen=26, kept=14.0, evictions=1)
    assert torch.is_grad_enabled()


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    """Here and not in test_lm_eval.py, which needs it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["bench", "lm-eval", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == (
        "restkv: error: lm-evaluation-harness is not installed; install it with: pip install 'restkv[eval]'\n"
    )

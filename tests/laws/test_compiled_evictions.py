"""A compiled eviction keeps what an eager one keeps, ties excepted: every policy and allocation, per KV and per query head.

Two sessions of one small model take the same steps, both eagerly; only their evictions differ. More than a thousand cases in
all, of combinations that are compiled once each.
"""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from torch import Tensor

from make.effort import IN_CI
from make.small import eagerly, small_ids, small_model
from modeling.compiled import compiled
from restkv.engine import Engine
from restkv.errors import PolicyError
from restkv.masking import evict
from restkv.policies import (
    CAOTE,
    H2O,
    RKV,
    TOVA,
    Compactor,
    CurDKV,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    KVzipPlus,
    Policy,
    Random,
    ReSTKV,
    SnapKV,
    StreamingLLM,
)
from restkv.session import Session
from restkv.testing.watch import positions, snapshot

BUDGET, INTERVAL, EVICTIONS = 12, 4, 3
EXAMPLES = 21
TIE = 1e-5  # scores this close, relative to the larger, may rank either way
SCORES: dict[str, tuple[type[Policy], dict[str, Any]]] = {
    "restkv": (ReSTKV, {"window": 3}),
    "restkv indicator": (ReSTKV, {"window": 3, "aggregate": "indicator", "alpha": 0.3}),
    "restkv refitted": (ReSTKV, {"window": 3, "refit": "both"}),
    "snapkv": (SnapKV, {"window": 3, "pooling": "max"}),
    "h2o": (H2O, {}),
    "tova": (TOVA, {}),
    "caote": (CAOTE, {}),
    "expected-attention": (ExpectedAttention, {"sinks": 1}),
    "kvzip-plus": (KVzipPlus, {"window": 3, "sinks": 1, "probe": "window"}),
    "compactor": (Compactor, {"window": 2, "sinks": 1}),
    "rkv": (RKV, {"window": 3}),
    "curdkv": (CurDKV, {"sinks": 1}),
    "keydiff": (KeyDiff, {}),
    "keynorm": (KeyNorm, {"sinks": 2}),
    "random": (Random, {}),
    "streamingllm": (StreamingLLM, {"positions": "original"}),
}


def combinations() -> dict[str, Policy]:
    """Those that the policies admit."""
    found = {}
    for name, by, granularity in itertools.product(SCORES, ("uniform", "pyramid", "adakv", "global"), ("kv", "query")):
        made, options = SCORES[name]
        try:
            policy = made(BUDGET, interval=INTERVAL, budget_by=by, granularity=granularity, **options)
        except PolicyError:
            continue
        found[f"{name}, {by}, {granularity}"] = policy
    return found


COMBINATIONS = combinations()
HERE = list(COMBINATIONS)[:: 21 if IN_CI else 1]  # under CI four: each allocation, and both granularities twice


def test_all_combinations_are_tried():
    assert len(COMBINATIONS) * EXAMPLES >= 1000
    assert {name.split(",")[0] for name in COMBINATIONS} == set(SCORES)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_compiled_eviction_keeps_what_an_eager_one_keeps(name):
    torch._dynamo.reset()
    policy, model = COMBINATIONS[name], small_model(3, windows=(7, None), thetas=(100.0, 1000.0))
    eager, masking = (eagerly(Engine(model, "flex")) for _ in range(2))
    run = compiled(evict)
    masking.evict = lambda *arguments: run(*arguments, regions=True)  # type: ignore[method-assign]
    eager.masks = lambda policy: False  # type: ignore[method-assign]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @drawn(
        lengths=st.tuples(*[st.integers(1, 90)] * 2), seed=st.integers(0, 1 << 16), ends=st.sampled_from([None, 0, 1])
    )
    def compare(lengths: tuple[int, int], seed: int, ends: int | None) -> None:
        sessions = [Session(engine, policy, lengths, 40) for engine in (eager, masking)]
        tokens = small_ids(2 * INTERVAL * EVICTIONS, seed)
        for session in sessions:
            session.prefill([small_ids(length, seed + row) for row, length in enumerate(lengths)])
        for step in range(INTERVAL * EVICTIONS):
            if step == INTERVAL and ends is not None:
                for session in sessions:
                    session.finish(ends)
            scores: list[tuple[Tensor, Tensor]] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(policy), "ranking", noting(type(policy).ranking, scores))
                sessions[0].feed(torch.tensor(tokens[2 * step :][:2]))
            sessions[1].feed(torch.tensor(tokens[2 * step :][:2]))
            one, other = ([positions(lists) for lists in snapshot(session.cache)] for session in sessions)
            if one != other:
                assert all(abs(a - b) <= TIE * max(abs(a), abs(b)) for a, b in apart(one, other, scores)), (one, other)
                return

    with torch.no_grad():
        compare()
    torch._dynamo.reset()


def noting(ranking: Any, scores: list[tuple[Tensor, Tensor]]) -> Any:
    """Policy.ranking, which leaves scores and positions [B, X, C] of every layer behind."""

    def ranked(policy: Policy, obs: Any) -> Any:
        said = ranking(policy, obs)
        scores.append(said[:2])
        return said

    return ranked


def apart(one: Any, other: Any, scores: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Scores of entries that one of the two kept and the other did not, each beside every other."""
    differ = []
    for layer, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        score_XC, pos_XC = (x.flatten(0, 1) for x in scores[layer])
        for head, (kept, too) in enumerate(zip(mine, theirs, strict=True)):
            differ += [float(score_XC[head][pos_XC[head] == pos][0]) for pos in set(kept) ^ set(too)]
    return list(itertools.combinations(differ, 2))

"""The engine against the papers' own algorithms, step by step: logits and kept positions after every token.

Letters: B batch rows, V vocabulary, L prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from laws.kept import engine_kept
from make.policies import FOUR
from make.small import small_ids, small_model
from modeling.layers import Decoder
from restkv.engine import Engine
from restkv.policies import H2O, TOVA, FullCache, KeyDiff, LaCache, Policy, ReSTKV, SnapKV, StreamingLLM
from restkv.session import Session
from restkv.testing.models import exact
from twins.stepwise import Row, with_rope

STEPS = 36  # decode steps: more than COMPACT_EVERY, so that marking and reclaiming both happen
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}


def follow(
    model: Decoder,
    policy: Policy,
    lengths: Sequence[int] = (50,),
    steps: int = STEPS,
    chunk: int | None = None,
    turns: Sequence[Sequence[int]] = (),
    ends: Sequence[int] | None = None,
) -> Session:
    """Run a session and one twin per row side by side: prompts, decode steps, then turns of several tokens per row.

    ends: the step after which each row is finished.
    """
    ends = ends or [steps + 1] * len(lengths)
    rows = [Row(model, policy) for _ in lengths]
    prompts = [small_ids(length, seed=7 + i) for i, length in enumerate(lengths)]
    more = [small_ids(steps, seed=70 + i) for i, _ in enumerate(lengths)]
    how: dict[str, Any] = {} if chunk is None else {"prefill": "chunked", "chunk": chunk}
    session = Session(Engine(model, "sdpa"), policy, lengths, steps, extends=bool(turns), **how)

    def compare(step, logits, running):
        for index in running:
            gap = (session.logits_BV[index] - logits[index]).abs().max()
            assert gap < CLOSE[model.dtype], f"step {step}, row {index}"
        for index, row in enumerate(rows):
            assert engine_kept(session, index) == row.kept(), f"step {step}, row {index}"

    session.prefill(prompts)
    compare("prompt", [row.prefill(ids, chunk) for row, ids in zip(rows, prompts, strict=True)], range(len(rows)))
    for step in range(steps):
        running = [index for index, end in enumerate(ends) if step < end]
        session.feed(torch.tensor([ids[step] for ids in more]))
        logits = {index: rows[index].feed(more[index][step]) for index in running}
        compare(step, logits, running)
        for index, end in enumerate(ends):
            if step + 1 == end:
                session.finish(index)
    session.resume(0)
    for turn, counts in enumerate(turns):
        pieces = [small_ids(count, seed=700 + 10 * turn + i) for i, count in enumerate(counts)]
        session.extend(pieces)
        logits = {i: rows[i].extend(piece, chunk or 512) for i, piece in enumerate(pieces) if piece}
        compare(f"turn {turn}", logits, list(logits))
    if len(rows) == 1:  # of a batch, the session counts evictions of any row
        assert session.evictor.evictions == rows[0].evictions
    return session


# Per-step rules: a cache of 16, prompts below and above it.
EVERY_STEP = {
    "streamingllm": StreamingLLM(16),
    "streamingllm original": StreamingLLM(16, positions="original"),
    "streamingllm sinks": StreamingLLM(9, sinks=1),
    "h2o": H2O(16),
    "h2o recent": H2O(16, recent=3, sinks=2),
    "h2o slot": H2O(16, positions="slot"),
    "h2o query": H2O(16, granularity="query"),
    "tova": TOVA(16),
    "tova protected": TOVA(16, protect=((3, 7),)),
    "lacache": LaCache(16),
    "lacache span": LaCache(24, span=2, overlap=1),
    "restkv": ReSTKV(16, window=4, interval=1, budget_by="uniform"),
    "restkv query": ReSTKV(16, window=4, interval=1, granularity="query", aggregate="indicator", budget_by="uniform"),
}
# Rules that rest between evictions.
INTERVALS = {
    "restkv": ReSTKV(16, window=4, interval=7, budget_by="uniform"),
    "restkv joint": ReSTKV(16, window=4, interval=12, gqa="joint", budget_by="uniform"),
    "restkv query": ReSTKV(16, window=4, interval=7, granularity="query", budget_by="uniform"),
    "restkv once": ReSTKV(16, window=4, interval=None, budget_by="uniform"),
    "restkv mark": ReSTKV(16, window=4, interval=5, high_water=29, budget_by="uniform"),
    "restkv part": ReSTKV(0.3, window=4, interval=7, budget_by="uniform"),
    "snapkv": SnapKV(16, window=4, interval=7, pooling="max", gqa="max"),
    "h2o": H2O(16, interval=7),
    "h2o slot": H2O(16, interval=9, positions="slot", high_water=20),
    "h2o query": H2O(16, interval=7, granularity="query"),
    "streamingllm": StreamingLLM(16, interval=7),
    "streamingllm once": StreamingLLM(16, interval=None, positions="original", window=2, sinks=0, fill="first"),
    "tova": TOVA(16, interval=7),
    "lacache": LaCache(16, interval=7),
    "keydiff": KeyDiff(16, interval=1, high_water=24),
    "full": FullCache(),
}
BOTH = EVERY_STEP | {f"{name}, interval": policy for name, policy in INTERVALS.items()}


def named(policies, without=()):
    return [pytest.param(policy, id=name) for name, policy in policies.items() if name not in without]


every_step = pytest.mark.parametrize("policy", named(EVERY_STEP))
both = pytest.mark.parametrize("policy", named(BOTH))

DOUBLE = exact(small_model(windows=FOUR))
SINGLE = small_model(windows=FOUR)


@every_step
@pytest.mark.parametrize(("length", "steps"), [(5, 16), (50, STEPS)])
def test_every_step_is_the_papers(policy, length, steps):
    """A prompt that leaves room in the cache, and one that has to be cut at once."""
    follow(DOUBLE, policy, [length], steps)


@pytest.mark.parametrize("policy", named(INTERVALS))
def test_evictions_wait_for_their_interval_or_mark(policy):
    follow(DOUBLE, policy, [30], steps=26)


@pytest.mark.parametrize("policy", named(BOTH, without=("lacache span",)))
def test_a_chunk_attends_before_it_is_evicted(policy):
    """Chunks of a prompt and of later turns, longer than the window, the budget and all that H2O calls recent."""
    follow(DOUBLE, policy, [55], steps=5, chunk=20, turns=[[45], [3]])


@both
def test_rows_of_a_batch_are_alone(policy):
    """Ragged rows; two end early and their caches stay as they are, then take part in another turn."""
    # The session counts an interval's tokens for all rows together: turns of different lengths only where it is 1.
    turns = [[5, 0, 30], [0, 2, 2]] if policy.interval in (1, None) else []
    follow(DOUBLE, policy, [11, 40, 17], steps=9, ends=[1, 99, 6], turns=turns)


@every_step
def test_in_single_precision(policy):
    follow(SINGLE, policy, [40], steps=12)


WINDOWED = exact(small_model(3, windows=(6, None, 20, None), thetas=(100.0, 1000.0)))


@pytest.mark.parametrize("policy", named(BOTH, without=("lacache span", "streamingllm once, interval")))
def test_sliding_windows(policy):
    """What a window has hidden goes first; positions in the text decide what it hides, wherever an entry's slot is."""
    follow(WINDOWED, policy, [12, 50], steps=7, chunk=18)


@both
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 8), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_groups(policy, kv_heads, group):
    model = exact(small_model(windows=FOUR, kv_heads=kv_heads, group=group))
    if group == 1 or policy.gqa != "joint":
        follow(model, policy, [30], steps=7)


CAPPED = exact(small_model(5, windows=(None, 9, None, 9), attn_softcap=2.0, final_softcap=5.0))


@pytest.mark.parametrize(
    "policy", [H2O(16, granularity="query"), TOVA(16), ReSTKV(16, window=4, interval=1, budget_by="uniform")]
)
def test_soft_caps(policy):
    follow(CAPPED, policy, [30], steps=5)


ROPES = {
    "yarn": {"kind": "yarn", "factor": 4.0, "original_positions": 24, "attention_factor": 1.1},
    "llama3": {"kind": "llama3", "factor": 4.0, "original_positions": 24},
    "dynamic": {"kind": "dynamic", "factor": 2.0, "original_positions": 24},
    "dynamic, smaller than the cache": {"kind": "dynamic", "factor": 2.0, "original_positions": 12},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(
    "policy", [StreamingLLM(16), LaCache(16), H2O(16, positions="slot")], ids=lambda policy: policy.name
)
def test_rope_counts_slots(rope, policy):
    """Stretched ropes see slot numbers too: a prompt of 40 is beyond the trained length, the cache left of it is not."""
    follow(exact(with_rope(small_model(windows=FOUR), **rope)), policy, [40, 7], steps=10)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("windows", [FOUR, (6, None, 20, None)], ids=["full", "sliding"])
def test_a_full_cache_in_chunks_is_the_dense_prefill(chunk, windows):
    model = exact(small_model(2, windows=windows))
    prompts = [small_ids(50), small_ids(3, seed=1)]
    sessions = []
    ways: list[dict[str, Any]] = [{}, {"prefill": "chunked", "chunk": chunk}]
    for how in ways:
        session = Session(Engine(model, "sdpa"), FullCache(), [50, 3], 4, **how)
        session.prefill(prompts)
        session.feed(torch.tensor([1, 2]))
        sessions.append(session)
    dense, chunked = sessions
    assert (dense.logits_BV - chunked.logits_BV).abs().max() < 1e-9
    assert [engine_kept(chunked, row) for row in (0, 1)] == [engine_kept(dense, row) for row in (0, 1)]
    for mine, theirs in zip(chunked.cache.layers, dense.cache.layers, strict=True):
        mine_RC, theirs_RC = mine.slots()[0], theirs.slots()[0]
        assert (mine.pool.k[0, 0, mine_RC] - theirs.pool.k[0, 0, theirs_RC]).abs().max() < 1e-9

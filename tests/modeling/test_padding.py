"""Padding and finished rows write zeros, and no NaN of theirs reaches a row that goes on.

Letters: B batch rows, T new tokens, K KV heads, G query heads per KV head, W remembered queries.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import IN_CI
from make.policies import FOUR, POLICY
from make.small import VOCAB, small_ids, small_lm, small_model
from modeling.cache import KVCache
from modeling.forward import step
from modeling.pool import SINK_PAGE
from restkv.engine import Engine
from restkv.policies import ReSTKV
from restkv.session import Session

EOS = 7
NAMES = "restkv", "restkv joint global", "snapkv layers", "caote", "keydiff", "h2o query", "h2o slot", "lacache", "full"
POLICIES = {name: POLICY[name] for name in NAMES} | {"restkv half": ReSTKV(0.5, window=4, interval=8)}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
COMPANIONS = {"keep": ((2,), torch.bool), "mass": ((1,), torch.float32), "raw": ((8,), torch.float32)}


def blank(cache: KVCache) -> bool:
    """Whether what nobody owns holds zeros: the page of discarded writes, free pages, and each row's spare query."""
    fine = True
    for layer in cache.layers:
        pool = layer.pool
        free = [SINK_PAGE, *pool._free]
        slabs = [pool.k[0, 0], pool.v[0, 0], *(slab for name, slab in pool.companions.items() if name != "keep")]
        fine &= not any(slab.view(pool.num_pages, -1)[free].any() for slab in slabs)
        fine &= bool((pool.pos.view(pool.num_pages, -1)[free] == -1).all())
    for ring in cache.queries:
        fine &= not ring.view(cache.rows, cache.ring_size + 1, -1)[:, cache.ring_size].any()
    return fine


@settings(max_examples=60)
@given(
    real=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    value=st.sampled_from([torch.nan, torch.inf, 3e38]),
    window=st.integers(0, 3),
    softcap=st.sampled_from([None, 5.0]),
)
def test_padding_writes_zeros_and_changes_no_row(real, value, window, softcap):
    """Rows of one step, some of their tokens padding whose embedding is poison, are the rows alone."""
    model = small_model(attn_softcap=softcap, windows=(3, None), fused=len(real) % 2 == 0)
    model.embed_tokens.weight[0] = value
    shape: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }

    def run(rows: list[int]) -> tuple[KVCache, list[list[torch.Tensor]]]:
        cache = KVCache.create(
            windows=(3, None), rows=len(rows), entries=12, page=4, ring_size=window, companions=COMPANIONS, **shape
        )
        out = []
        for turn in range(2):  # the second reads what the first has written
            ids = [[1 + (row + t + turn) % (VOCAB - 1) if t < real[row] else 0 for t in range(5)] for row in rows]
            counts_B1 = torch.tensor([[real[row]] for row in rows])
            pos_BT = torch.where(torch.arange(5) < counts_B1, turn * counts_B1 + torch.arange(5), -1).int()
            cache.reserve([real[row] for row in rows])
            x_BTE = step(
                model, torch.tensor(ids), pos_BT, cache.lag, cache.views(), cache.queries, cache.ring_size, "sdpa"
            )
            out.append([x_BTE[index, : real[row]] for index, row in enumerate(rows)])
        return cache, out

    cache, together = run(list(range(len(real))))
    assert blank(cache)
    for row in range(len(real)):
        _, alone = run([row])
        for turn in range(2):
            torch.testing.assert_close(together[turn][row], alone[turn][0], atol=1e-5, rtol=1e-5)


@every_policy
def test_a_row_that_ends_on_poison_harms_no_other(policy):
    """What nobody reads does no harm: an EOS whose embedding is NaN ends its row, and the others go on as alone."""
    prompts = [[1 + token % 3 for token in small_ids(n, seed=n)] for n in (33, 20, 9)]
    free = small_lm(windows=FOUR).generate(prompts, policy, max_new_tokens=20)
    eos = next(token for token in free[1].tokens[3:] if token > 3 and token not in free[0].tokens[:3])
    clean, lm = small_lm(eos=(eos,), windows=FOUR), small_lm(eos=(eos,), windows=FOUR)
    want = clean.generate(prompts, policy, max_new_tokens=20)
    lm.model.embed_tokens.weight[eos] = torch.nan
    if 0 not in {token for row in want for token in row.tokens[:-1]}:
        lm.model.embed_tokens.weight[0] = torch.nan  # what pads
    for burst in (1, 8):
        lm._burst = burst
        got = lm.generate(prompts, policy, max_new_tokens=20)
        for row, expected in zip(got, want, strict=True):
            assert (row.tokens, row.finish_reason) == (expected.tokens, expected.finish_reason)
        assert got[0].stats.kept == want[0].stats.kept
    assert len({len(row.tokens) for row in want}) > 1, "rows are to end at different times"


@every_policy
def test_ragged_texts_after_ragged_prompts(policy):
    """A chunk is padded with token 0; whether it is poison makes no difference, nor does who is finished."""
    said = []
    for value in (0.5, torch.nan):
        lm = small_lm(windows=FOUR)
        lm.model.embed_tokens.weight[0] = value
        session = Session(lm.engine, policy, [20, 9, 30], 9, chunk=8, extends=True)
        session.prefill([[1 + t % 20 for t in range(n)] for n in (20, 9, 30)])
        session.extend([[3] * 11, [], [5] * 3])
        session.finish(2)
        for _ in range(10):
            session.feed(torch.tensor([4, 5, 0]))  # row 2 has ended on poison
        assert blank(session.cache)
        said.append((session.logits_BV[:2], [row[:2] for row in session.kept()]))
    torch.testing.assert_close(said[0][0], said[1][0], atol=1e-5, rtol=1e-5)
    assert said[0][1] == said[1][1]


def test_pages_that_come_back_hold_nothing_of_their_last_owner():
    """A question that made NaN must not be found by the next one, which gets the same pages."""
    lm = small_lm(windows=FOUR)
    session = Session(lm.engine, POLICY["restkv"], [30], 40, extends=True, forks=1)
    session.prefill([small_ids(30)])
    want = None
    for value in (1.0, torch.nan, 1.0):
        fork = session.fork(20)
        lm.model.embed_tokens.weight[3] = value
        fork.extend([[3, 3, 3]])
        fork.cache.free()
        assert blank(session.cache)
        other = session.fork(20)
        other.extend([[4, 5, 6, 4, 5]])
        want = other.logits_BV if want is None else want
        assert torch.equal(other.logits_BV, want)
        other.cache.free()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["restkv", "h2o query", *([] if IN_CI else ["full", "streamingllm"])])
def test_compiled_too(name):
    torch._dynamo.reset()
    prompts = [[1 + (row + t) % 6 for t in range(n)] for row, n in enumerate((33, 20))]
    policy, said = POLICY[name], []
    model = small_model(group=3, head_dim=16, windows=FOUR)
    model.embed_tokens.weight[[0, EOS]] = torch.nan
    for backend in ("sdpa", "flex"):
        session = Session(Engine(model, backend), policy, [33, 20], 20, chunk=8, extends=True)
        session.prefill(prompts)
        session.extend([[3] * 5, []])
        session.finish(1)
        for _ in range(10):
            session.feed(torch.tensor([4, EOS]))
        assert blank(session.cache)
        said.append(session.logits_BV[0])
    assert said[1].isfinite().all()
    torch.testing.assert_close(said[0], said[1], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()

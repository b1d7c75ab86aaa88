"""Every policy beside ReST-KV, SnapKV and LaCache equals its slow twin: scores on random observations, sets on streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from make.effort import many
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
    Random,
    StreamingLLM,
    get_policy,
)
from restkv.testing.cases import shapes
from restkv.testing.observed import collected, observation, root_for, rotary
from twins import reference_policies as reference
from twins.by_hand import steps

even_shapes = shapes.map(lambda shape: {**shape, "head_dim": 2 * shape["head_dim"]})
sets = st.sampled_from(
    [{"granularity": "kv", "gqa": "mean"}, {"granularity": "kv", "gqa": "max"}, {"granularity": "query"}]
)


def assert_same(policy, obs, w_o, **given):
    got, want = policy.score(obs).double().numpy(), reference.scores(policy, obs, w_o, **given)
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12)


@settings(max_examples=many(200, 2))
@given(shape=shapes)
def test_tova(shape):
    obs, w_o = observation(**shape)
    assert_same(TOVA(9), obs, w_o)


@settings(max_examples=many(200, 2))
@given(shape=shapes)
def test_keydiff(shape):
    obs, w_o = observation(**shape)
    assert_same(KeyDiff(9), obs, w_o)


@settings(max_examples=many(100, 2))
@given(
    shape=shapes,
    seed=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 200),
    granularity=st.sampled_from(["kv", "query"]),
)
def test_random_keynorm_and_streamingllm(shape, seed, layer, granularity):
    obs, w_o = observation(**shape, per_head=granularity == "query")
    obs = replace(obs, layer=layer, num_layers=201)
    assert_same(Random(9, seed=seed, granularity=granularity), obs, w_o)
    if granularity == "kv":
        assert_same(KeyNorm(9), obs, w_o)
        assert_same(StreamingLLM(9), obs, w_o)


@settings(max_examples=many(200, 2))
@given(
    shape=even_shapes,
    options=st.fixed_dictionaries(
        {
            "sinks": st.sampled_from([0, 1, 4]),
            "future": st.sampled_from([1, 7, 40]),
            "covariance": st.booleans(),
            "value_norm": st.booleans(),
            "epsilon": st.sampled_from([0.0, 0.02]),
        }
    ),
    sets=sets,
    per_head=st.booleans(),
    factor=st.sampled_from([1.0, 1.3]),
)
def test_expected_attention(shape, options, sets, per_head, factor):
    policy = ExpectedAttention(9, **options, **sets)
    obs, w_o = observation(**shape, per_head=per_head and policy.granularity == "query")
    frequencies = [1.7 / 3**i for i in range(shape["head_dim"] // 2)]
    obs = replace(obs, rotary=rotary(frequencies, factor))
    assert_same(policy, obs, w_o, frequencies=frequencies, factor=factor)


def test_expected_attention_of_many_queries_in_parts(monkeypatch):
    obs, w_o = observation(queries=24, rows=2, ragged=True)
    obs = replace(obs, rotary=rotary([0.5, 0.1]))
    monkeypatch.setattr("restkv.policies.expected.QUERIES", 5)
    assert_same(ExpectedAttention(9, future=3), obs, w_o, frequencies=[0.5, 0.1])


@settings(max_examples=many(100, 2))
@given(
    shape=even_shapes,
    queries=st.sampled_from([1, 4, 24]),
    options=st.fixed_dictionaries(
        {
            "window": st.sampled_from([0, 1, 4]),
            "sinks": st.sampled_from([0, 1, 4]),
            "blending": st.sampled_from([None, 0.0, 0.3, 2.0]),
            "sketch_dimension": st.sampled_from([1, 3, 48]),
            "chunk_size": st.sampled_from([1, 3, 8, 256]),
            "seed": st.integers(0, 2**32 - 1),
        }
    ),
    layer=st.integers(0, 200),
    factor=st.sampled_from([1.0, 1.3]),
)
def test_compactor(shape, queries, options, layer, factor):
    policy = Compactor(9, **options)
    obs, w_o = observation(**{**shape, "queries": queries})
    frequencies = [1.7 / 3**i for i in range(shape["head_dim"] // 2)]
    obs = replace(obs, rotary=rotary(frequencies, factor), layer=layer, num_layers=201)
    got, want = policy.score(obs).numpy(), reference.scores(policy, obs, w_o, frequencies=frequencies, factor=factor)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)  # of a Gram matrix that is nearly singular


@settings(max_examples=many(100, 2))
@given(
    shape=shapes,
    options=st.fixed_dictionaries(
        {
            "leverage": st.sampled_from(["product", "key", "value", "mean"]),
            "neighbours": st.sampled_from([None, 1, 3, 16]),
            "projection": st.sampled_from([None, 1, 20]),
            "seed": st.integers(0, 2**32 - 1),
        }
    ),
    layer=st.integers(0, 200),
)
def test_curdkv(shape, options, layer):
    obs, w_o = observation(**shape)
    assert_same(CurDKV(9, **options), replace(obs, layer=layer, num_layers=201), w_o)


@settings(max_examples=many(200, 2))
@given(
    shape=shapes,
    options=st.fixed_dictionaries(
        {
            "mix_lambda": st.sampled_from([0.0, 0.07, 0.1, 1.0]),
            "kernel_size": st.sampled_from([1, 3, 7]),
            "threshold": st.sampled_from([-1.0, 0.0, 0.5]),
        }
    ),
)
def test_rkv(shape, options):
    obs, w_o = observation(**shape)
    assert_same(RKV(9, **options), obs, w_o)


def test_rkv_of_entries_that_say_the_same_favours_the_newest():
    """Three keys alike among others that are unlike: each older one is more redundant, the newest as little as any other."""
    obs, _ = observation(kv_heads=1, group=1, columns=12, queries=2, head_dim=8)
    k = torch.eye(8, dtype=torch.float64)[torch.tensor([0, 1, 2, 3, 1, 4, 5, 1, 6, 7, 0, 2])][None, None]
    score = RKV(9, window=2, mix_lambda=0.0).score(replace(obs, k=k))[0, 0]
    assert score[5] == score[7] > score[4] > score[1]


@settings(max_examples=many(100, 2))
@given(shape=shapes, sets=sets, output_weight=st.booleans(), per_head=st.booleans())
def test_caote_is_the_measured_change_of_the_newest_querys_output(shape, sets, output_weight, per_head):
    policy = CAOTE(9, output_weight=output_weight, **sets)
    obs, w_o = observation(**shape, per_head=per_head and policy.granularity == "query")
    obs = replace(obs, root=root_for(policy, w_o, shape["kv_heads"]))
    got, want = policy.score(obs).numpy(), reference.scores(policy, obs, w_o)
    # A difference of two outputs of size 1 is what is measured: of a small one it knows few digits.
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7)


@settings(max_examples=many(100, 2))
@given(shape=shapes, granularity=st.sampled_from(["kv", "query"]))
def test_observed_attention_is_the_mean_weight_over_the_queries_that_saw_an_entry(shape, granularity):
    """Of a whole prompt, so that the queries that saw an entry can be counted one by one."""
    shape = {**shape, "columns": 12, "queries": 12, "ragged": False, "shuffled": False}
    policy = get_policy("h2o", preset="observed-attention", budget=9, granularity=granularity)
    obs, _ = observation(**shape)
    score = policy.score(replace(obs, mass=collected(policy, obs)))
    heads = [reference.reference.Head(obs, 0, h) for h in range(obs.q.shape[1])]
    reach = shape["sliding_window"] or 12
    for x, line in enumerate(score[0].tolist()):
        members = [x] if granularity == "query" else range(x * shape["group"], (x + 1) * shape["group"])
        for p, got in enumerate(line):
            watchers = range(p, min(12, p + reach))
            if not obs.hidden[0, 0, p]:
                want = np.mean([[heads[h].attention[w][p] for w in watchers] for h in members])
                assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


# -- step by step, as the released codes run


def random_stream(random, group=None):
    """Every shape a stream may have, and a prompt of it; sometimes longer, sometimes shorter than the budget."""
    kv_heads, group = int(random.integers(1, 3)), group or int(random.integers(1, 4))
    tokens = int(random.integers(8, 28))
    stream = reference.Stream(random, kv_heads * group, kv_heads, tokens, int(random.integers(1, 6)))
    return stream, int(random.integers(1, tokens)), int(random.integers(2, tokens))


def same_steps(policy, stream, prompt, twin):
    for step, (mine, theirs) in enumerate(zip(steps(policy, stream, prompt), twin, strict=True)):
        assert mine == theirs, f"step {step}"


@pytest.mark.parametrize("case", range(200))
def test_h2o_step_by_step(case):
    stream, prompt, budget = random_stream(random := np.random.default_rng(case))
    recent = None if case % 2 else int(random.integers(0, budget + 1))
    twin = reference.h2o(stream, prompt, budget, budget // 2 if recent is None else recent)
    same_steps(H2O(budget, recent=recent), stream, prompt, twin)


@pytest.mark.parametrize("case", range(200))
def test_tova_step_by_step(case):
    stream, prompt, budget = random_stream(np.random.default_rng(case))
    same_steps(TOVA(budget), stream, prompt, reference.tova(stream, prompt, budget))


@pytest.mark.parametrize("case", range(40))
def test_streamingllm_step_by_step(case):
    stream, prompt, budget = random_stream(random := np.random.default_rng(case))
    sinks = int(random.integers(0, budget))
    same_steps(StreamingLLM(budget, sinks=sinks), stream, prompt, reference.streamingllm(stream, prompt, budget, sinks))


def test_mass_travels_with_its_entry_and_dies_with_it():
    """Token 1 wins the prompt by mass and never again by attention; forgetting the sums would evict it at once."""
    random = np.random.default_rng(0)
    stream = reference.Stream(random, 1, 1, 12, 2)
    stream.q[:], stream.k[:] = 0.0, 0.0
    stream.q[:, :6, 0], stream.k[:, 1, 0] = 50.0, 1.0
    stream.q[:, 6:, 0] = -50.0  # token 1 is now what they look at least
    held = [kept[0] for kept in steps(H2O(4, recent=2), stream, 6)]
    assert all(1 in positions for positions in held)
    forgetful = [kept[0] for kept in steps(TOVA(4, window=2), stream, 6)]
    assert 1 in forgetful[0] and 1 not in forgetful[1]


def test_random_keeps_its_set_and_draws_evenly():
    """A fresh draw at every step would leave almost only recent entries after a while."""
    stream = reference.Stream(np.random.default_rng(0), 1, 1, 400, 1)
    *_, ((kept),) = steps(Random(40), stream, 40)
    assert 120 < np.mean(kept) < 280
    obs, _ = observation(kv_heads=2, columns=4000, queries=1)
    a, b = Random(9).score(obs), Random(9, seed=1).score(obs)
    assert abs(a.mean() - 0.5) < 0.02 and abs(a.std() - 12**-0.5) < 0.02
    lines = [a[0, 0], a[0, 1], b[0, 0], Random(9).score(replace(obs, layer=1, num_layers=2))[0, 0]]
    correlation = torch.corrcoef(torch.stack(lines)) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.08


def test_the_released_streamingllm_of_the_paper(shared):
    """The first B - W and the last W of a prompt, under preset "paper-needle" (docs/sources.md §2.2)."""
    with safe_open(shared / "golden" / "streaming.safetensors", "pt") as file:
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    policy = get_policy("streamingllm", preset="paper-needle", budget=64)
    (held,) = {tuple(held) for held in next(steps(policy, _stream_of(data), data["k"].shape[2]))}
    for name in ("k", "v"):
        assert torch.equal(data[name].repeat_interleave(2, 1)[:, :, list(held)], data[f"kept_{name}"])


def _stream_of(data):
    stream = reference.Stream(np.random.default_rng(0), 1, 1, 1, 1)
    stream.q, stream.k, stream.v = (data[name][0].numpy() for name in "qkv")
    return stream

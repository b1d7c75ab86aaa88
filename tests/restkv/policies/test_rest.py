"""ReST-KV: its score is the change that deleting an entry makes, and every option equals the slow twin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from make.effort import many
from restkv import observe, pooling
from restkv.budgets import Allocation
from restkv.errors import PolicyError
from restkv.policies import ReSTKV, get_policy
from restkv.policies.rest import _query_weights
from restkv.testing import check_policy
from restkv.testing.cases import shapes
from restkv.testing.observed import observation, root_for
from twins import reference

UNSMOOTHED: dict[str, Any] = {"window": 1, "alpha": 1.0, "pooling": "none", "interval": None}


def measured_removal(obs, w_o_EHD, heads):
    """||sum over `heads` of W_O^h (o_h without entry i - o_h)||, really deleting each entry, for the one observed query."""
    heads_of = [reference.Head(obs, 0, h) for h in heads]
    change = []
    for i in range(len(heads_of[0].pos)):
        moved = 0.0
        for h, head in zip(heads, heads_of, strict=True):
            (a,) = head.attention
            rest = reference.without(a, i)
            moved = moved + w_o_EHD[:, h].numpy() @ (head.output(rest, range(len(a))) - head.output(a, range(len(a))))
        change.append(np.linalg.norm(moved))
    return np.array(change)


# What is measured is a difference of two outputs of size 1: below 1e-5 it knows fewer than nine digits of itself.
MEASURED: dict[str, Any] = {"rtol": 1e-9, "atol": 2e-14}


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_indicator_is_the_measured_change_of_one_head(spread):
    policy = ReSTKV(None, aggregate="indicator", granularity="query", **UNSMOOTHED)
    for seed in range(10):
        obs, w_o = observation(seed, queries=1, columns=40, head_dim=8, width=32, spread=spread)
        score = policy.score(obs)
        for h in range(4):
            np.testing.assert_allclose(score[0, h].numpy(), measured_removal(obs, w_o, [h]), **MEASURED)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_joint_is_the_measured_change_of_a_group(group):
    policy = ReSTKV(None, aggregate="indicator", gqa="joint", **UNSMOOTHED)
    for seed in range(10):
        obs, w_o = observation(seed, queries=1, columns=30, head_dim=6, width=32, group=group, spread=3.0)
        obs = replace(obs, root=observe.group_root_of(w_o, 2))
        score = policy.score(obs)
        for k in range(2):
            measured = measured_removal(obs, w_o, range(k * group, (k + 1) * group))
            np.testing.assert_allclose(score[0, k].numpy(), measured, **MEASURED)


def test_mean_over_a_group_is_not_the_change_of_the_group():
    """Why "joint" exists: outputs of a group's heads add up as vectors, which a mean of lengths does not see."""
    obs, w_o = observation(queries=1, columns=30, head_dim=6, width=32, group=4)
    mean = ReSTKV(None, aggregate="indicator", gqa="mean", **UNSMOOTHED).score(obs)[0, 0].numpy() * 4
    measured = measured_removal(obs, w_o, range(4))
    assert (mean >= measured * (1 - 1e-9)).all()
    assert np.median(mean / measured) > 1.2


def planted(seed, share, common, columns=512, queries=32):
    """Independent keys and values, but `share` of the attention goes to the window and values have a mean of `common`."""
    obs, _ = observation(seed, kv_heads=2, group=2, queries=queries, columns=columns, head_dim=64, width=256)
    q, k = obs.q.clone(), obs.k.clone()
    if share:
        q[..., 0], k[..., 0] = 1, 0
        k[:, :, -queries:, 0] = math.log(share / (1 - share) * (columns - queries) / (queries / 2)) * 64**0.5
    mean = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * common
    return replace(obs, q=q, k=k, v=obs.v + mean)


@pytest.mark.parametrize(
    ("share", "common", "error", "same"),
    # docs/methods.md: median error of a score, and how many of the 96 best past entries are the same.
    [(0, 0, 0.002, 0.997), (0.1, 1, 0.022, 0.970), (0.5, 1, 0.21, 0.916), (0.5, 3, 1.34, 0.891), (0.9, 3, 2.19, 0.890)],
)
def test_attention_first_is_biased_by_what_the_window_takes(share, common, error, same):
    policy = ReSTKV(None, alpha=0.3, pooling="none", granularity="query")
    errors, overlaps = [], []
    for seed in range(5):
        obs = planted(seed, share, common)
        first, exact = (
            replace(policy, aggregate=aggregate).score(obs)[..., :-32] for aggregate in ("attention", "indicator")
        )
        errors.append((first / exact - 1).abs().median())
        best_first, best = first.topk(96).indices, exact.topk(96).indices
        overlaps.append((best_first[..., None] == best[..., None, :]).any(-1).double().mean())
    assert torch.stack(errors).mean() == pytest.approx(error, rel=0.15)
    assert torch.stack(overlaps).mean() == pytest.approx(same, abs=0.015)


options = st.fixed_dictionaries(
    {
        "budget": st.integers(1, 30),
        "alpha": st.sampled_from([None, 0.2, 0.3, 1.0]),
        "scale": st.sampled_from([0.7, 1, 2.5, 2000]),
        "kernel_size": st.sampled_from([1, 3, 5, 21]),
        "aggregate": st.sampled_from(["attention", "indicator"]),
        "drift": st.sampled_from(["released", "symmetric"]),
        "pooling": st.sampled_from(["adaptive", "avg", "max", "none"]),
        "output_weight": st.booleans(),
        "normalize": st.booleans(),
        "tau": st.sampled_from([1, 0, 0.5, 2]),
        "gqa": st.sampled_from(["mean", "max", "joint"]),
        "granularity": st.sampled_from(["kv", "query"]),
        "window": st.integers(1, 6),
    }
)


def build(values):
    """The policy of these options, without the combinations that it refuses."""
    values = {**values, "budget": values["budget"] + values["window"] - 1}
    if values["granularity"] == "query" and values["gqa"] == "joint":
        values["gqa"] = "max"
    if values["gqa"] == "joint":
        values["output_weight"] = True
    if values["aggregate"] == "attention":
        values["normalize"] = False
    if values["aggregate"] == "indicator" or values["gqa"] == "joint" or not values["output_weight"]:
        values["tau"] = 1
    return ReSTKV(**values)


def assert_same(policy, obs, w_o, rtol, atol=0.0):
    obs = replace(obs, root=root_for(policy, w_o, obs.k.shape[1]))
    got, want = policy.score(obs).double().numpy(), reference.scores(policy, obs, w_o)
    promised = ~np.isnan(want)
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got[promised], want[promised], rtol=rtol, atol=atol)


@settings(max_examples=many(300, 2))
@given(shape=shapes, values=options, per_head=st.booleans(), budget_each=st.booleans(), bounded=st.booleans())
def test_equals_the_slow_twin(shape, values, per_head, budget_each, bounded):
    policy = build(values)
    obs, w_o = observation(**shape, per_head=per_head and policy.granularity == "query")
    if budget_each:
        budget_B = policy.window + torch.arange(1, obs.q.shape[0] + 1)
        obs = replace(obs, budget_B=budget_B, budgets=tuple(budget_B.tolist()) if bounded else None)
    assert_same(policy, obs, w_o, rtol=1e-7, atol=1e-9)


@settings(max_examples=60)
@given(shape=shapes, values=options, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_half_precision_is_scored_in_float32(shape, values, dtype):
    # A scale far above the number of entries: a rounded tie in the ranking may move the drift, not the kernel made of it.
    policy = build({**values, "scale": 2000})
    obs, w_o = observation(**shape, dtype=dtype)
    assert policy.score(replace(obs, root=root_for(policy, w_o, obs.k.shape[1]))).dtype == torch.float32
    assert_same(policy, obs, w_o, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("drift", "kernel_size", "kernel", "shift"),
    # docs/sources.md §1.6 c, scale 2000.
    [
        (0, 5, 5, 1),
        (1, 5, 5, 0),
        (-1, 5, 5, 0),
        (1999, 5, 5, 0),
        (2000, 5, 5, 1),
        (-2000, 5, 5, 0),
        (-2001, 5, 5, -1),
        (6000, 5, 7, 3),
        (-6000, 5, 7, -2),
        (-6001, 5, 7, -3),
        (22000, 21, 23, 11),
    ],
)
def test_kernel_and_shift_of_the_released_code(drift, kernel_size, kernel, shift):
    got = ReSTKV(None, kernel_size=kernel_size)._adapt(torch.tensor([[float(drift)]], dtype=torch.float64))
    assert [x.item() for x in got] == [kernel, shift]


def test_symmetric_drift_mirrors():
    drift = torch.arange(-9000.0, 9001.0, 250, dtype=torch.float64)[None]
    kernel, shift = ReSTKV(None, drift="symmetric")._adapt(drift)
    assert torch.equal(shift, -shift.flip(-1)) and torch.equal(kernel, kernel.flip(-1))
    assert shift.unique().tolist() == list(range(-4, 5))


def test_no_drift_can_be_measured_with_one_query():
    policy = ReSTKV(8, window=1, kernel_size=1, scale=1)
    obs, _ = observation(queries=1)
    assert torch.equal(policy.score(obs)[..., :-1], replace(policy, pooling="none").score(obs)[..., :-1])


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_ema_weights_are_the_recursion_over_the_queries_a_row_has(alpha):
    q_pos = torch.tensor([[4, 5, 6, 7], [-1, -1, 6, 7], [-1, -1, -1, 7], [-1, -1, -1, -1]])
    weights = _query_weights(q_pos, alpha)
    for row, count in zip(weights.tolist(), [4, 2, 1, 0], strict=True):
        unit = [[float(i == j) for j in range(count)] for i in range(count)]
        assert row == pytest.approx([0.0] * (4 - count) + [reference.ema(u, alpha) for u in unit])


@settings(max_examples=15, suppress_health_check=[HealthCheck.nested_given])
@given(values=options)
def test_any_options_keep_the_laws(values):
    """Where an entry lies, other rows, padding and chunks change nothing."""
    check_policy(build(values), examples=3, laws=["columns", "padding", "rows", "chunks"])


@pytest.mark.parametrize("aggregate", ["attention", "indicator"])
@pytest.mark.parametrize("gqa", ["mean", "max", "joint"])
def test_a_sink_that_takes_all_attention_stays_finite(aggregate, gqa):
    """In bfloat16 its weight rounds to 1, where released code gave inf, and NaN to the neighbours (docs/sources.md §1.6 f)."""
    policy = ReSTKV(12, window=4, aggregate=aggregate, gqa=gqa)
    obs, w_o = observation(dtype=torch.bfloat16, queries=4, columns=40, head_dim=8)
    k = torch.zeros_like(obs.k)
    k[:, :, 0, 0] = 1
    q = torch.zeros_like(obs.q)
    q[..., 0] = 600
    obs = replace(obs, q=q, k=k, root=root_for(policy, w_o, 2))
    assert observe.attention_BHWC(obs)[..., 0].min() == 1
    score = policy.score(obs)
    assert score.isfinite().all()
    assert (score[..., 0] > score[..., 3:36].amax(-1)).all()


@pytest.mark.parametrize("gap", [3.0, 9.0, 15.0, 30.0])
def test_float32_knows_the_score_of_a_sink_that_leaves_little(gap):
    """1 - a is 1e-1 .. 2e-13, of which float32 loses all: a/(1-a) * (o - v) would be noise, then 0, and the sink evicted."""
    policy = ReSTKV(None, aggregate="indicator", granularity="query", **UNSMOOTHED)
    obs, w_o = observation(queries=1, columns=40, head_dim=8, width=32, spread=0.5)
    k = obs.k.clone()
    k[:, :, 3] = 0
    bias = torch.tensor([gap + 3.0] + [0.0] * 7, dtype=torch.float64) * 8**0.5
    k[:, :, :, 0], k[:, :, 3, 0] = 0, 1  # one channel that only the sink has
    obs = replace(obs, q=obs.q + bias, k=k)
    half = replace(obs, q=obs.q.float(), k=k.float(), v=obs.v.float())
    measured = np.stack([measured_removal(obs, w_o, [h]) for h in range(4)])
    assert (measured.argmax(-1) == 3).all()
    np.testing.assert_allclose(policy.score(half)[0].numpy(), measured, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("past", [0, 1, 3])
@pytest.mark.parametrize("pool", ["adaptive", "avg", "max", "none"])
@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_past_entries_than_the_kernel(past, pool, queries):
    policy = ReSTKV(queries + 1, window=queries, pooling=pool, kernel_size=21, granularity="query", scale=1)
    obs, w_o = observation(queries=queries, columns=queries + past)
    assert_same(policy, obs, w_o, rtol=1e-9)


@pytest.mark.slow  # the laws trace every score (tests/laws/test_every_policy.py); this one runs its kernels
def test_scoring_and_selection_compile_without_a_break():
    from restkv.select import select

    policy = ReSTKV(24, window=8, scale=5)
    obs, _ = observation(queries=8, columns=64, head_dim=8, dtype=torch.float32, ragged=True, rows=2, seed=3)

    def keep(q, q_pos, k, v, pos, root, budget):
        seen = observe.Observation(q, q_pos, k, v, pos, root, obs.softmax_scale, budget_B=budget)
        return select(policy.score(seen), pos, pos >= q_pos.amax(-1)[:, None, None] - 7, budget)

    assert obs.root is not None
    inputs = (obs.q, obs.q_pos, obs.k, obs.v, obs.pos, obs.root.float(), torch.tensor([24, 20]))
    assert torch.equal(torch.compile(keep, fullgraph=True, dynamic=False)(*inputs), keep(*inputs))


def test_a_wide_range_of_scores_survives_the_window():
    """A prefix sum would lose the small scores behind a sink whose odds are 1/eps."""
    line = torch.tensor([[[1e8, 1e-9, 1e-9, 1e-9, 1e-9, 2e-9, 3e-9]]])
    count, kernel, shift = torch.tensor([[7]]), torch.tensor([[3]]), torch.tensor([[0]])
    smooth = pooling.shifted_average(line, count, kernel, shift, widest=5)
    torch.testing.assert_close(smooth[0, 0, 2:], torch.tensor([1e-9, 1e-9, 4e-9 / 3, 2e-9, 8e-9 / 3]))


def test_presets_are_the_papers_scripts():
    script = get_policy("restkv", preset="paper-longbench", budget=128)
    assert isinstance(script, ReSTKV)
    assert (script.kernel_size, script.alpha, script.budget_by) == (5, 0.3, Allocation())
    assert get_policy("restkv", preset="paper", budget=128) == replace(script, granularity="kv", interval=128)
    ruler = get_policy("restkv", preset="paper-ruler", budget=1024, alpha=0.5)
    assert isinstance(ruler, ReSTKV)
    assert (ruler.kernel_size, ruler.granularity, ruler.interval, ruler.alpha) == (21, "query", None, 0.5)
    equation = get_policy("restkv", preset="eq7", budget=128)
    assert isinstance(equation, ReSTKV) and equation.aggregate == "indicator"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"window": 0}, "window 0"),
        ({"alpha": 0}, "alpha 0"),
        ({"scale": -1}, "scale -1"),
        ({"kernel_size": 4}, "kernel_size 4.*odd"),
        ({"aggregate": "sum"}, "aggregate 'sum'.*attention, indicator"),
        ({"drift": "none"}, "drift 'none'.*released, symmetric"),
        ({"pooling": "avgpool"}, "pooling 'avgpool'.*adaptive, avg, max, none"),
        ({"gqa": "sum"}, "gqa 'sum'.*mean, max, joint"),
        ({"tau": -1}, "tau -1: give a number of at least 0"),
        ({"tau": 2, "aggregate": "indicator"}, "tau 2"),
        ({"tau": 2, "output_weight": False}, "tau 2"),
        ({"normalize": True}, "normalize True"),
        ({"gqa": "joint", "granularity": "query"}, "gqa 'joint'"),
        ({"gqa": "joint", "output_weight": False}, "gqa 'joint'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(values, words):
    with pytest.raises(PolicyError, match=words) as caught:
        ReSTKV(64, **values)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("restkv: ")


def test_a_fractional_budget_needs_the_observation_to_say_how_many_entries():
    obs, _ = observation()
    with pytest.raises(PolicyError, match=r"budget 0\.5.*budget_B"):
        ReSTKV(0.5, window=4).score(obs)

"""SnapKV equals its slow twin, and its presets are the published settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from restkv.errors import PolicyError
from restkv.policies import SnapKV, get_policy
from restkv.testing.cases import shapes
from restkv.testing.observed import observation
from twins import reference


@settings(max_examples=many(200, 2))
@given(
    shape=shapes,
    kernel_size=st.sampled_from([1, 3, 5, 7, 31]),
    pooling=st.sampled_from(["avg", "max", "none"]),
    granularity=st.sampled_from(["kv", "query"]),
    gqa=st.sampled_from(["mean", "max"]),
    per_head=st.booleans(),
)
def test_equals_the_slow_twin(shape, kernel_size, pooling, granularity, gqa, per_head):
    policy = SnapKV(64, kernel_size=kernel_size, pooling=pooling, granularity=granularity, gqa=gqa)
    obs, _ = observation(**shape, per_head=per_head and granularity == "query")
    got, want = policy.score(obs).numpy(), reference.scores(policy, obs)
    promised = ~np.isnan(want)
    np.testing.assert_allclose(got[promised], want[promised], rtol=1e-9, atol=1e-15)


def test_presets():
    official = get_policy("snapkv", preset="official", budget=1024)
    assert isinstance(official, SnapKV)
    assert (official.window, official.kernel_size, official.pooling) == (32, 7, "max")
    paper = get_policy("snapkv", preset="paper", budget=1024)
    assert isinstance(paper, SnapKV)
    assert (paper.window, paper.kernel_size, paper.pooling) == (32, 5, "avg")
    assert {p.granularity for p in (official, paper)} == {"query"} and official.interval is None


def test_needs_no_output_weight():
    obs, _ = observation(dtype=torch.float32)
    assert SnapKV(64).needs == frozenset()
    assert SnapKV(64).score(obs).shape == obs.pos.shape


@pytest.mark.parametrize(
    "values", [{"window": 0}, {"kernel_size": 2}, {"kernel_size": 0}, {"pooling": "adaptive"}, {"gqa": "joint"}]
)
def test_bad_options(values):
    (option,) = values
    with pytest.raises(PolicyError, match=f"snapkv: {option}"):
        SnapKV(64, **values)

"""What every policy shares: options, budgets, names, and the shape and sign of a score."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from observed import gram_for, observation

import restkv
from restkv.errors import PolicyError, RestKVError
from restkv.policies import POLICIES, FullCache, Policy, ReSTKV, SnapKV, get_policy


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": 0}, "budget 0"),
        ({"budget": -4}, "budget -4"),
        ({"budget": True}, "budget True"),
        ({"budget": 0.0}, "budget 0.0.*fraction"),
        ({"budget": 1.5}, "budget 1.5.*fraction"),
        ({"budget": float("nan")}, "budget nan.*fraction"),
        ({"budget": "64"}, "budget '64'"),
        ({"budget": 35, "sinks": 4}, r"budget 35.*window \(32\).*sinks \(4\).*at least 36"),
        ({"budget": 64, "window": -1}, "window -1"),
        ({"budget": 64, "window": 2.0}, "window 2.0"),
        ({"budget": 64, "sinks": -1}, "sinks -1"),
        ({"budget": 64, "interval": 0}, "interval 0"),
        ({"budget": 64, "granularity": "head"}, "granularity 'head'.*kv, query"),
        ({"budget": 64, "gqa": "sum"}, "gqa 'sum'.*mean, max"),
        ({"budget": 64, "protect": ((4, 4),)}, "protect"),
        ({"budget": 64, "protect": ((-1, 4),)}, "protect"),
        ({"budget": 64, "protect": (3, 5)}, "protect"),
        ({"budget": 64, "protect": "0:5"}, "protect"),
    ],
)
def test_bad_options_are_one_line_with_value_place_and_mend(values, words):
    with pytest.raises(PolicyError, match=words) as caught:
        SnapKV(**values)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("snapkv: ") and isinstance(caught.value, RestKVError)


def test_a_budget_of_window_and_sinks_is_recency_and_allowed():
    assert SnapKV(36, window=32, sinks=4).budget_for(1000) == 36


def test_budgets():
    assert ReSTKV(128).budget_for(10) == 128
    assert ReSTKV(0.29).budget_for(100) == 33  # 29 would not hold the window and one entry more
    assert ReSTKV(0.29, window=8).budget_for(100) == 29
    assert ReSTKV(1.0).budget_for(777) == 777
    assert ReSTKV(None).budget is None and FullCache().budget is None


def test_policies_are_values():
    assert ReSTKV(64, protect=[[0, 5]]) == ReSTKV(64, protect=((0, 5),))
    assert len({SnapKV(64), SnapKV(64), SnapKV(65)}) == 2
    with pytest.raises(FrozenInstanceError):
        SnapKV(64).budget = 3


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (("snap",), {"budget": 64}, "'snap'.*restkv, snapkv, full"),
        (("restkv", "paper"), {"budget": 64}, "preset 'paper'.*paper-longbench, paper-ruler, eq7"),
        (("full", "paper"), {}, "preset 'paper'.*none"),
        (("snapkv",), {"budget": 64, "alpha": 0.3}, "option 'alpha'.*kernel_size"),
        (("restkv",), {}, "budget is missing"),
        (("full",), {"budget": 64}, "budget 64"),
    ],
)
def test_get_policy_says_what_exists(args, options, words):
    with pytest.raises(PolicyError, match=words):
        get_policy(*args, **options)


def test_get_policy_knows_every_policy_and_the_package_exports_it():
    for name, cls in POLICIES.items():
        assert type(get_policy(name, **({} if name == "full" else {"budget": 64}))) is cls and cls.name == name
    assert restkv.get_policy is get_policy and restkv.ReSTKV is ReSTKV
    with pytest.raises(AttributeError, match="nothing"):
        _ = restkv.nothing


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("granularity", ["kv", "query"])
def test_padding_and_what_a_window_hides_score_below_everything(name, granularity):
    policy = get_policy(name, budget=None, granularity=granularity)
    if name == "restkv":
        policy = replace(policy, budget=32)
    obs, w_o = observation(rows=3, ragged=True, window=9, queries=3, dtype=torch.float32, seed=1)
    score = policy.score(replace(obs, gram=gram_for(policy, w_o, 2)))
    gone = (obs.pos < 0) | obs.hidden
    if granularity == "query":
        gone = gone.repeat_interleave(2, 1)
    assert score.shape == gone.shape and score.dtype == torch.float32
    assert gone.any() and not gone.all()
    assert (score[gone] == -torch.inf).all() and score[~gone].isfinite().all()


def test_a_new_policy_is_a_name_and_an_importance():
    @dataclass(frozen=True)
    class Loudest(Policy):
        name = "loudest"

        def importance(self, obs):
            return obs.v.norm(dim=-1)

    obs, _ = observation(group=3)
    assert torch.equal(Loudest(40).score(obs), obs.v.norm(dim=-1))
    assert torch.equal(Loudest(40, granularity="query").score(obs), obs.v.norm(dim=-1).repeat_interleave(3, 1))

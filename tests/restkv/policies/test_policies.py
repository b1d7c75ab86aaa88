"""What every policy shares: options, names, and numbers at their limits. Laws: tests/laws/test_every_policy.py."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from typing import Any

import pytest
import torch

import restkv
from restkv import observe
from restkv.budgets import Allocation
from restkv.errors import PolicyError, RestKVError
from restkv.policies import (
    CAOTE,
    H2O,
    POLICIES,
    RKV,
    TOVA,
    AdaKV,
    Compactor,
    CurDKV,
    ExpectedAttention,
    FullCache,
    KeyDiff,
    KeyNorm,
    KVzip,
    KVzipPlus,
    LaCache,
    Policy,
    PyramidKV,
    Random,
    ReSTKV,
    SnapKV,
    StreamingLLM,
    get_policy,
    known_policies,
)
from restkv.testing.observed import observation, prepared

VARIANTS = {
    "restkv": ReSTKV(12, window=4),
    "restkv eq7": ReSTKV(12, window=4, aggregate="indicator", drift="symmetric", scale=3),
    "restkv joint": ReSTKV(12, window=4, gqa="joint"),
    "restkv query": ReSTKV(12, window=4, granularity="query"),
    "snapkv": SnapKV(12, window=4),
    "snapkv query": SnapKV(12, window=4, pooling="max", granularity="query"),
    "pyramidkv": PyramidKV(12, window=4),
    "adakv": AdaKV(12, window=4),
    "h2o": H2O(12),
    "h2o query": H2O(12, granularity="query"),
    "h2o per query": get_policy("h2o", preset="observed-attention", budget=12),
    "tova": TOVA(12),
    "caote": CAOTE(12),
    "caote max": CAOTE(12, gqa="max", output_weight=True),
    "caote joint": CAOTE(12, gqa="joint", output_weight=True),
    "caote query": CAOTE(12, granularity="query"),
    "expected-attention": ExpectedAttention(12, future=9),
    "expected-attention max": ExpectedAttention(12, future=9, gqa="max", epsilon=0.02),
    "expected-attention query": ExpectedAttention(12, future=9, granularity="query", covariance=False),
    "kvzip": KVzip(12, window=4),
    "kvzip-plus": KVzipPlus(12, window=4),
    "kvzip-plus query": KVzipPlus(12, window=4, granularity="query"),
    "compactor": Compactor(14, sinks=2),
    "rkv": RKV(12, window=4),
    "curdkv": CurDKV(12),
    "curdkv projected": CurDKV(12, projection=3, neighbours=None),
    "keynorm": KeyNorm(12),
    "keydiff": KeyDiff(12),
    "streamingllm": StreamingLLM(12),
    "streamingllm first": get_policy("streamingllm", preset="paper-needle", budget=40),
    "lacache": LaCache(12),
    "random": Random(12),
    "random query": Random(12, granularity="query", seed=3),
    "full": FullCache(),
    "full query": FullCache(granularity="query"),
}
variants = pytest.mark.parametrize("policy", VARIANTS.values(), ids=VARIANTS)


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
        ({"budget": ()}, r"budget \(\)"),
        ({"budget": (64, 0)}, r"budget \(64, 0\)"),
        ({"budget": (64, 31)}, r"budget \(64, 31\).*at least 32"),
        ({"budget": 35, "sinks": 4}, r"budget 35.*window \(32\).*sinks \(4\).*at least 36"),
        ({"budget": 64, "window": -1}, "window -1"),
        ({"budget": 64, "window": 2.0}, "window 2.0"),
        ({"budget": 64, "sinks": -1}, "sinks -1"),
        ({"budget": 64, "interval": 0}, "interval 0"),
        ({"budget": 64, "granularity": "head"}, "granularity 'head'.*kv, query"),
        ({"budget": 64, "gqa": "sum"}, "gqa 'sum'.*mean, max"),
        ({"budget": 64, "budget_by": "even"}, "budget_by 'even'.*uniform"),
        ({"budget": 64, "protect": ((4, 4),)}, "protect"),
        ({"budget": 64, "protect": ((-1, 4),)}, "protect"),
        ({"budget": 64, "protect": (3, 5)}, "protect"),
        ({"budget": 64, "protect": "0:5"}, "protect"),
        ({"budget": 64, "high_water": 100.5}, "high_water 100.5"),
        ({"budget": 64, "high_water": 0}, "high_water 0"),
    ],
)
def test_bad_options_are_one_line_with_value_place_and_mend(values, words):
    with pytest.raises(PolicyError, match=words) as caught:
        SnapKV(**values)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("snapkv: ") and isinstance(caught.value, RestKVError)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("tova", {"granularity": "query"}, "granularity 'query': choose from kv"),
        ("keynorm", {"granularity": "query"}, "granularity 'query': choose from kv"),
        ("keydiff", {"gqa": "max"}, "gqa 'max': choose from mean"),
        ("h2o", {"gqa": "max"}, "gqa 'max': choose from mean"),
        ("h2o", {"recent": -1}, "recent -1"),
        ("h2o", {"recent": 0.5}, "recent 0.5"),
        ("h2o", {"recent": 65}, "recent 65.*budget of 64"),
        ("h2o", {"recent": 65, "budget": (80, 64)}, "recent 65.*budget of 64"),
        ("h2o", {"positions": "slots"}, "positions 'slots': choose from slot, original"),
        ("h2o", {"positions": "slot", "budget_by": "pyramid"}, "positions 'slot'.*uniform"),
        ("h2o", {"positions": "slot", "granularity": "query"}, "positions 'slot'.*unions"),
        ("streamingllm", {"budget": (64, 32)}, "positions 'slot'.*one budget"),
        ("streamingllm", {"fill": "last"}, "fill 'last': choose from newest, first"),
        ("caote", {"gqa": "joint"}, "gqa 'joint'.*output_weight"),
        ("caote", {"gqa": "joint", "output_weight": True, "granularity": "query"}, "gqa 'joint'"),
        ("expected-attention", {"future": 0}, "future 0"),
        ("expected-attention", {"epsilon": -1}, "epsilon -1"),
        ("compactor", {"blending": -0.1}, "blending -0.1"),
        ("compactor", {"sketch_dimension": 0}, "sketch_dimension 0"),
        ("compactor", {"chunk_size": 2.0}, "chunk_size 2.0"),
        ("compactor", {"seed": 1 << 32}, "seed 4294967296"),
        ("compactor", {"granularity": "query"}, "granularity 'query'"),
        ("rkv", {"mix_lambda": 1.1}, "mix_lambda 1.1"),
        ("rkv", {"threshold": 2}, "threshold 2"),
        ("rkv", {"kernel_size": 4}, "kernel_size 4"),
        ("rkv", {"window": 0}, "window 0"),
        ("rkv", {"gqa": "mean"}, "gqa 'mean': choose from max"),
        ("rkv", {"probe": "replay"}, "probe 'replay'"),
        ("curdkv", {"leverage": "both"}, "leverage 'both': choose from product"),
        ("curdkv", {"neighbours": 0}, "neighbours 0"),
        ("curdkv", {"projection": 2.5}, "projection 2.5"),
        ("random", {"seed": -1}, "seed -1"),
        ("random", {"seed": 1.0}, "seed 1.0"),
        ("random", {"gqa": "max"}, "gqa 'max'"),
    ],
)
def test_what_has_no_meaning_for_a_method_is_refused_by_name(name, values, words):
    with pytest.raises(PolicyError, match=f"^{name}: {words}"):
        get_policy(name, **{"budget": 64, **values})


def test_a_budget_of_window_and_sinks_is_recency_and_allowed():
    assert SnapKV(36, window=32, sinks=4).budget_for(1000) == 36


def test_budgets():
    assert ReSTKV(128).budget_for(10) == 128
    assert ReSTKV(0.29).budget_for(100) == 33  # 29 would not hold the window and one entry more
    assert ReSTKV(0.29, window=8).budget_for(100) == 29
    assert ReSTKV(1.0).budget_for(777) == 777
    by_hand = ReSTKV((64, 32))
    assert by_hand.budget_for(100) == 48 and by_hand.layer_budgets(100, 2) == [64, 32]
    assert ReSTKV(64).layer_budgets(100, 3) == [64] * 3
    with pytest.raises(PolicyError, match=r"budget \(64, 32\): the model has 3 layers"):
        by_hand.layer_budgets(100, 3)
    with pytest.raises(PolicyError, match=r"restkv: budget \(64, 32\): budget_by global shares .* choose uniform"):
        ReSTKV((64, 32), budget_by="global")
    assert ReSTKV(None).budget is None and FullCache().budget is None


def test_policies_are_values():
    lists: Any = [[0, 5]]  # as JSON has them
    assert ReSTKV(64, protect=lists) == ReSTKV(64, protect=((0, 5),))
    assert len({SnapKV(64), SnapKV(64), SnapKV(65)}) == 2
    with pytest.raises(FrozenInstanceError):
        setattr(SnapKV(64), "budget", 3)  # noqa: B010 (a type checker would not let it pass)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        (("snap",), {"budget": 64}, "'snap'.*restkv, snapkv, .*full"),
        (("restkv", "papers"), {"budget": 64}, "preset 'papers'.*paper, paper-longbench, paper-ruler, eq7"),
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
    names = "restkv snapkv pyramidkv adakv h2o tova caote expected-attention kvzip kvzip-plus".split()
    names += "compactor rkv curdkv keynorm keydiff streamingllm lacache random full".split()
    assert list(POLICIES) == names and known_policies()[: len(POLICIES)] == tuple(POLICIES)
    for name, cls in POLICIES.items():
        assert type(get_policy(name, None, **({} if name == "full" else {"budget": 64}))) is cls and cls.name == name
        for preset, values in cls.PRESETS.items():
            policy = get_policy(name, preset=preset, **{"budget": 64, **values})
            expected = get_policy(name, **{"budget": 64, **values})
            assert (
                policy == expected and values.items() <= {**vars(policy), "budget_by": policy.allocation.name}.items()
            )
    assert restkv.get_policy is get_policy and restkv.ReSTKV is ReSTKV
    with pytest.raises(AttributeError, match="nothing"):
        _ = restkv.nothing


@pytest.mark.parametrize(("name", "budget_by"), [("pyramidkv", "pyramid"), ("adakv", "adakv")])
def test_budgets_with_a_name_of_their_own_are_snapkv_under_that_budget(name, budget_by):
    policy, same = get_policy(name, budget=64, kernel_size=7), SnapKV(64, kernel_size=7, budget_by=budget_by)
    assert asdict(policy) == asdict(same) and policy.allocation == same.allocation != Allocation()
    assert policy.layer_budgets(1000, 8) == same.layer_budgets(1000, 8)
    assert get_policy(name, budget=64, budget_by="uniform").allocation == Allocation()
    obs, _ = observation(queries=4, columns=40)
    assert torch.equal(policy.score(obs), same.score(obs))


def test_any_score_goes_under_any_budget():
    for name in ("restkv", "h2o", "tova", "keynorm", "keydiff", "expected-attention", "caote", "random"):
        for budget_by in ("uniform", "pyramid", "adakv", "global"):
            assert get_policy(name, budget=64, budget_by=budget_by).allocation.name == budget_by


def test_h2o_protects_half_of_its_budget_unless_told_otherwise():
    assert [H2O(None).newest(budget) for budget in (64, 65, 1)] == [32, 32, 0]
    assert H2O(516, recent=512).newest(516) == 512
    assert H2O(64, window=40).newest(64) == 40 and H2O(64, window=8, recent=4).newest(64) == 8


def test_what_an_eviction_looks_at():
    assert (TOVA(64).observed, TOVA(64, window=9).observed, CAOTE(64).observed) == (1, 1, 1)
    assert (H2O(64).observed, H2O(64, interval=16).observed) == (1, 16)  # all that are new since the last one
    policy = ExpectedAttention(64)
    assert policy.observed == policy.interval == 128 and policy.observed_prompt > 1 << 40
    assert (H2O(64).needs, policy.needs, CAOTE(64).needs) == ({"mass"}, {"rotary"}, frozenset())
    assert (CAOTE(64, output_weight=True).needs, VARIANTS["caote joint"].needs) == ({"root"}, {"group_root"})
    slots = {name for name, cls in POLICIES.items() if cls(None).slot_positions}
    assert slots == {"streamingllm", "lacache"} and get_policy("h2o", preset="streaming").slot_positions


@variants
@pytest.mark.parametrize("group", [1, 8])
def test_a_saturated_sink_in_bfloat16_leaves_no_nan(policy, group):
    """Attention of 1.0 on the first entry: odds of 1 / 0, and nothing left for the rest (docs/sources.md §1.6 f)."""
    obs, w_o = observation(group=group, queries=4, columns=40, head_dim=8, dtype=torch.bfloat16)
    q, k = torch.zeros_like(obs.q), torch.zeros_like(obs.k)
    q[..., 0], k[:, :, 0, 0] = 600, 1
    obs = prepared(policy, replace(obs, q=q, k=k), w_o)
    assert observe.attention_BHWC(obs)[..., 0].min() == 1
    assert policy.score(obs).isfinite().all()
    if policy.name in ("restkv", "snapkv", "h2o", "tova", "caote"):
        assert policy.keep(obs)[..., 0].all()


def test_a_new_policy_is_a_name_and_an_importance():
    @dataclass(frozen=True)
    class Loudest(Policy):
        name = "loudest"

        def importance(self, obs):
            return obs.v.norm(dim=-1)

    obs, _ = observation(group=3)
    assert torch.equal(Loudest(40).score(obs), obs.v.norm(dim=-1))
    assert torch.equal(Loudest(40, granularity="query").score(obs), obs.v.norm(dim=-1).repeat_interleave(3, 1))

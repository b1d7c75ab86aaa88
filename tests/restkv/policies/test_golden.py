"""Scores and kept sets recorded from the released code of ReST-KV and its bundled baselines (float32, per query head).

tests/data/golden holds a few of them, with q cut to the observed window; the whole set is tried where the shared folder is.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from make.places import DATA
from restkv.observe import Observation, root_of
from restkv.policies import ReSTKV, SnapKV
from restkv.select import select

SMALL = sorted((DATA / "golden").glob("*.safetensors"))
WHOLE = [
    "pyramid_l0",
    "pyramid_l3",
    "restkv_after_default",
    "restkv_after_drift",
    "restkv_after_gqa",
    "restkv_after_maxpool",
    "restkv_after_nopool",
    "restkv_after_nowo_mean_avg",
    "restkv_before_default",
    "restkv_before_norm",
    "snapkv_avg",
]
POOLING = {"adaptive": "adaptive", "maxpool": "max", "avgpool": "avg", None: "none"}


def policy_of(params, budget):
    common = {
        "budget": budget,
        "window": params["window"],
        "kernel_size": params["kernel_size"],
        "pooling": POOLING[params["pooling"]],
        "granularity": "query",
    }
    if "metric_mode" not in params:
        return SnapKV(**common)
    return ReSTKV(
        alpha=params["alpha"] if params["use_ema"] else None,
        scale=params["scale"],
        aggregate={"after": "attention", "before": "indicator"}[params["metric_mode"]],
        output_weight=params["use_wo"],
        normalize=params.get("use_norm", False),
        **common,
    )


def assert_matches(path):
    with safe_open(path, "pt") as file:
        params = json.loads(file.metadata()["params"])
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    W, L = params["window"], data["k"].shape[2]
    q, k, v, want, idx = data["q"][:, :, -W:], data["k"], data["v"], data["scores"], data["idx"].long()
    H, K, D = q.shape[1], k.shape[1], q.shape[3]
    pos = torch.arange(L).expand(1, K, L)
    root = root_of(data["w_o"].view(-1, H, D)) if "w_o" in data else None
    policy = policy_of(params, idx.shape[-1] + W)
    score = policy.score(Observation(q, torch.arange(L - W, L)[None], k, v, pos, root, D**-0.5))
    torch.testing.assert_close(score[..., : L - W], want, rtol=1e-5, atol=0)

    pos = pos.repeat_interleave(H // K, 1)
    keep = select(score, pos, pos >= L - W, policy.budget)
    assert (keep.sum(-1) == policy.budget).all() and keep[..., L - W :].all()
    theirs = torch.zeros_like(keep).scatter(-1, idx, True)
    cut = want.gather(-1, idx).amin(-1, keepdim=True)
    differ = (keep ^ theirs)[..., : L - W]
    assert ((want - cut).abs() < 1e-6 * cut)[differ].all()  # only entries tied with the last one kept


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_released_code(path):
    assert_matches(path)


@pytest.mark.parametrize("name", WHOLE)
def test_released_code_whole_set(name, shared):
    assert_matches(shared / "golden" / f"{name}.safetensors")


def test_the_copies_cover_both_aggregations_drift_and_snapkv():
    assert {p.stem for p in SMALL} == {"restkv_after_drift", "restkv_after_maxpool", "restkv_before_norm", "snapkv_avg"}

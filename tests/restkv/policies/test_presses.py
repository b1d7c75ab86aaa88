"""Compactor and CurDKV against scores and sets recorded from NVIDIA kvpress 0.5.5 (bench/speed/peers/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from make.places import DATA
from restkv.observe import Observation
from restkv.policies import Compactor, CurDKV, Policy, compactor
from restkv.testing.observed import protected, rotary

PATH = DATA / "presses" / "presses.safetensors"
with safe_open(PATH, "pt") as file:
    ABOUT = json.loads(file.metadata()["about"])
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
CASES = range(len(ABOUT["presses"]))


def recorded(case: int, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A press's parameters and its tensors."""
    parts = {key.split(".", 1)[1]: tensor for key, tensor in TENSORS.items() if key.startswith(f"{case}.")}
    return ABOUT["presses"][case][name], {key.removeprefix(f"{name}."): tensor for key, tensor in parts.items()}


def observed(policy: Policy, data: dict[str, Tensor]) -> Observation:
    """The whole prompt."""
    q, k, v = (data[name][None] for name in ("q_HLD", "k_KLD", "v_KLD"))
    K, L, D = k.shape[1:]
    pos, q_pos = torch.arange(L).expand(1, K, L), torch.arange(L)[None]
    frequencies = [ABOUT["theta"] ** (-2 * i / D) for i in range(D // 2)]
    obs = Observation(q, q_pos, k, v, pos, None, D**-0.5, rotary=rotary(frequencies))
    assert isinstance(policy.budget, int)
    always = protected(policy, pos, q_pos[:, -1], [policy.budget])
    return replace(obs, protected=always, budget_B=torch.tensor([policy.budget]))


def assert_same(policy: Policy, data: dict[str, Tensor], rtol: float, atol: float) -> None:
    """Scores of what is not protected, and kept sets."""
    obs = observed(policy, data)
    assert obs.protected is not None
    compared = ~obs.protected[0]
    torch.testing.assert_close(policy.score(obs)[0][compared], data["score_KL"][compared], rtol=rtol, atol=atol)
    kept = policy.keep(obs)[0]
    assert torch.equal(kept, torch.zeros_like(kept).scatter(-1, data["kept_KC"].long(), True))


@pytest.mark.parametrize("case", CASES)
def test_compactor(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Gaussian numbers that it drew. It solves in float32: what that loses is all there is between the two.

    By default it blends by its ratio, which is the share that goes but for a rounding.
    """
    press, data = recorded(case, "compactor")
    S = press["sketch_dimension"]
    monkeypatch.setattr(compactor, "gaussian", lambda *_: data["sketch_KDS"].double() * S**0.5)
    count = data["kept_KC"].shape[1]
    policy = Compactor(
        count,
        window=press["sink_size_end"],
        sinks=press["sink_size_start"],
        blending=press["blending"] if press["blending"] is not None else press["compression_ratio"],
        sketch_dimension=S,
        chunk_size=press["chunk_size"],
    )
    assert_same(policy, data, rtol=0, atol=2e-4)
    obs = observed(policy, data)
    exact = policy.score(replace(obs, q=obs.q.double(), k=obs.k.double(), v=obs.v.double()))
    torch.testing.assert_close(policy.score(obs).double(), exact, rtol=0, atol=2e-5)
    share = 1 - count / data["k_KLD"].shape[1]
    assert share == pytest.approx(press["compression_ratio"], abs=0.02)


@pytest.mark.parametrize("case", CASES)
def test_curdkv(case: int) -> None:
    press, data = recorded(case, "cur")
    policy = CurDKV(
        data["kept_KC"].shape[1],
        sinks=press["num_sinks"],
        leverage=press["leverage_type"].removeprefix("kv_").replace("avg", "mean"),
        neighbours=press["local_window_size"] if press["use_local_approximation"] else None,
    )
    assert_same(policy, data, rtol=1e-5, atol=1e-7)

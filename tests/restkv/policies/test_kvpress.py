"""Kept positions and scores recorded from NVIDIA kvpress 0.5.5 (bench/speed/peers/README.md): 20 random cases, seven presses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from make.places import DATA
from restkv.observe import Observation
from restkv.policies import TOVA, ExpectedAttention, KeyDiff, KeyNorm, SnapKV, StreamingLLM, get_policy
from restkv.testing.observed import collected, protected, rotary

CASES = sorted((DATA / "kvpress").glob("*.safetensors"))

# Their press as our policy, with the options that make the two the same (docs/policies.md), and our score as theirs.
PRESSES = {
    "snapkv": lambda n, p: SnapKV(n, window=p["window_size"], kernel_size=p["kernel_size"], gqa="mean"),
    "tova": lambda n, p: TOVA(n, window=1),
    "streamingllm": lambda n, p: StreamingLLM(n, sinks=p["n_sink"]),
    "keynorm": lambda n, p: KeyNorm(n),
    "keydiff": lambda n, p: KeyDiff(n),
    "observed_attention": lambda n, p: get_policy("h2o", preset="observed-attention", budget=n),
    "expected_attention": lambda n, p: ExpectedAttention(
        n,
        sinks=p["n_sink"],
        future=p["n_future_positions"],
        covariance=p["use_covariance"],
        value_norm=p["use_vnorm"],
        epsilon=p["epsilon"],
    ),
}


def case_of(path):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def observed(policy, about, data, window):
    """The observation of the whole prompt; policies that look at the last queries get those."""
    q, k, v = (data[name][None] for name in ("q_HLD", "k_KLD", "v_KLD"))
    L, D = k.shape[2:]
    pos, q_pos = torch.arange(L).expand(1, k.shape[1], L), torch.arange(L)[None]
    obs = Observation(q, q_pos, k, v, pos, None, D**-0.5)
    mass = collected(policy, obs) if "mass" in policy.needs else None
    frequencies = [about["case"]["rope_theta"] ** (-2 * i / D) for i in range(D // 2)]
    return replace(
        obs,
        q=q[:, :, L - window :],
        q_pos=q_pos[:, L - window :],
        mass=mass,
        rotary=rotary(frequencies),
        protected=protected(policy, pos, q_pos[:, -1], [policy.budget]),
        budget_B=torch.tensor([policy.budget]),
    )


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_same_entries_stay(name, path):
    about, data = case_of(path)
    press = about["presses"][name]
    policy = PRESSES[name](press["n_kept"], press)
    L = data["k_KLD"].shape[1]
    obs = observed(policy, about, data, press.get("window_size", L))
    kept = policy.keep(obs)[0]
    theirs = torch.zeros_like(kept).scatter(-1, data[f"{name}.kept_KC"].long(), True)
    assert torch.equal(kept, theirs)

    if name == "streamingllm":
        return  # 0 or 1 there, positions here
    rows = policy.window if name == "snapkv" else 1  # they take the mean over rows, we the sum
    got, want = policy.score(obs)[0] / rows, data[f"{name}.score_KL"]
    compared = ~obs.protected[0]  # what they protect they give the largest score of all, plus 1
    torch.testing.assert_close(got[compared], want[compared], rtol=2e-4, atol=1e-6)


def test_all_cases_are_there_and_some_decisions_are_hard():
    abouts = [case_of(path)[0] for path in CASES]
    assert len(CASES) == 20 and all(set(about["presses"]) == set(PRESSES) for about in abouts)
    assert {about["case"]["group"] for about in abouts} == {1, 2, 4}
    assert {about["versions"]["kvpress"] for about in abouts} == {"0.5.5"}


@pytest.mark.parametrize(
    ("name", "other", "differing"),
    [("snapkv", {"pooling": "max"}, 19), ("tova", {"window": 0}, 8), ("observed_attention", {"per_query": False}, 20)],
)
def test_what_the_authors_do_otherwise_shows(name, other, differing):
    """As counted in bench/speed/peers/README.md: the official reading of a method keeps other entries in so many cases."""
    count = 0
    for path in CASES:
        about, data = case_of(path)
        press = about["presses"][name]
        policy = replace(PRESSES[name](press["n_kept"], press), **other)
        kept = policy.keep(observed(policy, about, data, press.get("window_size", data["k_KLD"].shape[1])))[0]
        count += not torch.equal(kept, torch.zeros_like(kept).scatter(-1, data[f"{name}.kept_KC"].long(), True))
    assert count == differing

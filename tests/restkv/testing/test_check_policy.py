"""check_policy catches policies that break a law, each kind of them, and lets the others pass."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from make.mutants import MUTANTS, Sound
from make.places import environment
from modeling.families.registry import FAMILIES
from restkv.budgets import HeadAdaptive
from restkv.errors import ConfigError, PolicyError
from restkv.policies import Policy, SnapKV, StreamingLLM
from restkv.testing import LAWS, LawBroken, caches, check_policy, fitted, observations, replay, tiny_lm


@pytest.mark.parametrize("budget_by", ["uniform", "adakv", "global"])
@pytest.mark.parametrize("granularity", ["kv", "query"])
def test_a_sound_policy_keeps_every_law(granularity: str, budget_by: str) -> None:
    report = check_policy(Sound(64, granularity=granularity, budget_by=budget_by), examples=10, sessions=3)
    assert report.cases == dict.fromkeys(LAWS, 10) | {"memory": 1} | dict.fromkeys(list(LAWS)[-4:], 3)
    assert report.notes == [] and str(report).startswith("sound: kept every law (shapes 10, ")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught_and_named(mutant: type[Policy], seed: int) -> None:
    with pytest.raises(LawBroken) as caught:
        check_policy(mutant(64), examples=200, seed=seed, shrink=seed == 0)
    broken, line = caught.value, str(caught.value)
    assert broken.law in MUTANTS[mutant] and (seed or broken.law == "memory" or broken.case["columns"] < 20)
    assert "\n" not in line and line.startswith(f"{mutant.name}: law {broken.law!r} is broken: ") and " Mend: " in line
    with pytest.raises(LawBroken) as again:
        replay(broken.policy, broken.law, **broken.case)
    assert str(again.value) == line


def test_an_allocation_that_keeps_one_more_is_caught() -> None:
    class Generous(HeadAdaptive):
        def select(self, score_BXC, pos_BXC, protected_BXC, budget_B):
            return super().select(score_BXC, pos_BXC, protected_BXC, budget_B + 1)

    with pytest.raises(LawBroken, match="all heads of row 0 keep 13 of 13, not 12") as caught:
        check_policy(Sound(64, budget_by=Generous()), examples=50)
    assert caught.value.law == "counts"


@pytest.mark.parametrize("law", ["evictions", "batch", "compacted"])
def test_laws_of_sessions_catch_by_themselves(monkeypatch: pytest.MonkeyPatch, law: str) -> None:
    """What the laws of one observation would have caught first."""

    def ranking(policy: Policy, obs):
        score_BXC, pos_BXC, protected_BXC = Policy.ranking(policy, obs)
        if law == "evictions":
            protected_BXC = torch.zeros_like(protected_BXC)
        elif law == "batch":
            score_BXC = score_BXC * torch.tensor([1.0, -1.0, -1.0])[: len(score_BXC), None, None]
        elif obs.pos.shape[-1] > 16:
            score_BXC = -score_BXC
        return score_BXC, pos_BXC, protected_BXC

    monkeypatch.setattr(Sound, "ranking", ranking, raising=False)
    with pytest.raises(LawBroken) as caught:
        check_policy(Sound(64), sessions=40, laws=[law], shrink=False)
    assert caught.value.law == law and caught.value.case["lengths"]


def test_a_script_of_the_smallest_case_runs(tmp_path: Path) -> None:
    with pytest.raises(LawBroken) as caught:
        check_policy(next(iter(MUTANTS))(64, budget_by=HeadAdaptive(floor=0.5)), examples=20)
    script = tmp_path / "case.py"
    script.write_text(caught.value.script())
    ran = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr.rstrip().endswith(str(caught.value))
    assert "budget_by=HeadAdaptive(floor=0.5" in script.read_text()


def test_what_is_no_fault_is_told() -> None:
    class Waits(Sound):
        def importance(self, obs):
            return super().importance(obs) * (2 if obs.q_pos.amax() > 3 else 1)

    report = check_policy(Waits(64), examples=3, laws=["shapes", "waits", "traces"])
    assert [note.split("(")[0] for note in report.notes] == [
        "it waits for the device ",
        "eager only: its score does not compile as one graph ",
    ]


def test_mistakes_are_one_line() -> None:
    with pytest.raises(PolicyError, match="law 'colums': there is none of that name; choose from shapes, "):
        check_policy(Sound(64), laws=["colums"])
    with pytest.raises(PolicyError, match="a case of 'rows' has no 'length'; it has seed, rows, "):
        replay(Sound(64), "rows", length=3)
    with pytest.raises(PolicyError, match="is no Policy"):
        check_policy("snapkv")  # type: ignore[arg-type]


def test_options_that_small_cases_cannot_outgrow_are_made_smaller() -> None:
    small = fitted(SnapKV(1024, sinks=4, protect=((0, 20),), high_water=2000))
    assert (small.budget, small.window, small.sinks, small.high_water) == (28, 4, 2, 34)
    assert fitted(SnapKV((64, 96))).budget == (12, 13)
    assert fitted(SnapKV(0.5)) == replace(SnapKV(0.5), window=4)
    assert fitted(StreamingLLM(8, sinks=1)) == StreamingLLM(8, sinks=1)


# -- strategies and models


@settings(max_examples=20)
@given(obs=observations(SnapKV(64)))
def test_observations_can_be_chosen_from(obs) -> None:
    assert obs.protected is not None and bool((SnapKV(12, window=4).keep(obs) >= obs.protected).all())


@settings(max_examples=10)
@given(cache=caches(SnapKV(64)))
def test_caches_are_what_a_session_leaves(cache) -> None:
    for layer in cache.layers:
        assert bool((layer.live_counts().flatten() <= layer.used).all()) and int(layer.used.max()) > 0


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_a_tiny_model_of_every_family_generates(family: str) -> None:
    lm = tiny_lm(family)
    answer = lm.generate(list(range(20)), SnapKV(12, window=4, interval=4), max_new_tokens=6)
    assert len(answer.tokens) == 6 and max(map(max, answer.stats.kept)) <= 16
    with pytest.raises(ConfigError, match="tiny_lm\\('bert'\\): no such family; choose from llama, "):
        tiny_lm("bert")

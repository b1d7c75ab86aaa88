"""What a job compiles, and how often. What becomes of it where nothing compiles: test_not_compiled.py, test_kernel_folder.py."""

from __future__ import annotations

import random
import warnings
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from make.policies import LOPSIDED
from make.small import eagerly, small_ids, small_lm, small_model
from modeling.errors import RestKVWarning
from restkv import engine
from restkv.cli import main
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.observe import Observation
from restkv.policies import H2O, LaCache, ReSTKV, SnapKV
from restkv.warmup import warm_up

POLICY = ReSTKV(budget=20, window=4, interval=8)


def test_warming_up_leaves_nothing_to_compile():
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16), None, "flex")
    warmed = warm_up(lm, POLICY, prompt_tokens=17, max_new_tokens=9, rows=2)
    assert warmed.graphs == 2 and min(warmed.prefill_s, warmed.first_s, warmed.next_s) > 0
    said = lm.generate([small_ids(60), small_ids(3, seed=1)], POLICY, max_new_tokens=30)
    assert said[0].stats.graphs == 0
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(engine._decode.__code__)
    guards = str(entry.guard_manager)  # each with the line that asked for it
    assert "modeling/forward.py" in guards and "einops/parsing.py" not in guards, (
        "a step looks at what einops' parser has read"
    )
    torch._dynamo.reset()


@pytest.mark.parametrize(("options", "words"), [({"rows": 0}, "rows 0"), ({"prompt_tokens": 0}, "prompt_tokens 0")])
def test_warming_up_refuses_what_makes_no_sense(options, words):
    job = {"prompt_tokens": 4, "max_new_tokens": 4} | options
    with pytest.raises(PromptError, match=words):
        warm_up(LM(small_model(), None, "flex"), POLICY, **job)
    with pytest.raises(PromptError, match="compiles nothing"):
        warm_up(LM(small_model(), None, "sdpa"), POLICY, 4, 4)


@pytest.mark.parametrize(("asked", "told"), [("flex", True), ("auto", False), ("sdpa", False)])
def test_the_command_line_says_before_the_answer_that_it_compiles(rambler, monkeypatch, capsys, asked, told):
    def nothing(*_, **__):
        raise PromptError("no answer")

    monkeypatch.setattr(LM, "stream", nothing)
    assert main(["generate", str(rambler), "-p", "a story", "--backend", asked]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error == "restkv: error: no answer"
    assert [note.startswith("restkv: note: after the first token the step is compiled") for note in notes] == [
        True
    ] * told


class Asks(SnapKV):
    """A plugin's Python that no graph can hold."""

    name = "asks"

    def importance(self, obs: Observation) -> Tensor:
        return super().importance(obs) * (1 if obs.pos.max().item() >= 0 else 0)


def test_a_policy_that_cannot_be_compiled_evicts_eagerly_and_says_so():
    torch._dynamo.reset()
    policies = [Asks(20, window=4, interval=8), LaCache(20, span=1), SnapKV(20, window=4, interval=None)]
    eager, compiled = small_lm(head_dim=16), small_lm("flex", head_dim=16)
    eagerly(compiled.engine)
    del compiled.engine.evict  # which is compiled, while steps are not
    for policy, words in zip(policies, ("eager", "eager", ""), strict=True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            said = [lm.generate(small_ids(40), policy, max_new_tokens=20) for lm in (eager, compiled, compiled)]
        told = [str(one.message) for one in seen if one.category is RestKVWarning]
        assert [text.endswith("asks evicts eagerly from now on") for text in told] == [True] * (policy.name == "asks")
        assert said[0].tokens == said[1].tokens == said[2].tokens
        assert said[1].stats.evicts == words and said[1].stats.evictions == said[0].stats.evictions
    torch._dynamo.reset()


@pytest.mark.parametrize("length, evicted", [(30, False), (90, True)])
def test_an_answer_that_stays_within_its_budget_compiles_no_eviction(length, evicted):
    eager, compiled = small_lm(), small_lm("flex")
    policy = SnapKV(100, window=4, interval=4)
    calls = Mock(wraps=eagerly(compiled.engine).evict)
    compiled.engine.evict = calls  # type: ignore[method-assign]
    said = [lm.generate(small_ids(length), policy, max_new_tokens=40) for lm in (eager, compiled)]
    assert calls.called == evicted == bool(said[1].stats.evictions)
    assert said[0].tokens == said[1].tokens and said[0].stats.kept == said[1].stats.kept
    assert said[0].stats.max_kept == said[1].stats.max_kept


@pytest.mark.slow
def test_fifty_prompts_under_three_policies_compile_a_step_and_an_eviction_each():
    """Prompts shorter and longer than the budget; evicted as they grow, at every step, or once."""
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16), None, "flex")
    draw = random.Random(0)
    policies = [POLICY, H2O(budget=20, recent=4), SnapKV(budget=24, window=4, interval=None)]
    for policy in policies:
        graphs = 1 if policy.interval is None else 2
        assert lm.generate(small_ids(40), policy, max_new_tokens=12).stats.graphs == graphs
    for index in range(50):
        ids = small_ids(draw.randint(1, 300), seed=index)
        assert lm.generate(ids, policies[index % 3], max_new_tokens=12).stats.graphs == 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [LOPSIDED, ReSTKV(300, budget_by="pyramid")], ids=["lopsided", "pyramid"])
def test_no_graph_follows_the_first_evictions(policy):
    """... of heads that keep more than any before, nor of another pyramid."""
    torch._dynamo.reset()
    lm = LM(small_model(group=3, head_dim=16, windows=(None,) * 4), None, "flex")
    made = [lm.generate(small_ids(length), policy, max_new_tokens=140).stats.graphs for length in (380, 1200, 390, 600)]
    assert made == [2, 0, 0, 0]
    torch._dynamo.reset()

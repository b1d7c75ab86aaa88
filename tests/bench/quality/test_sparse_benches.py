"""Benches and commands over prompts that were read by a sparse pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.quality.fidelity import FidelityPlan
from bench.quality.ruler import Plan, answer
from bench.quality.tasks import Frame, make_sample
from bench.report.kinds import parts
from bench.report.tables import Table
from bench.runs.folder import read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run as run_plan
from bench.runs.together import prefill_together
from make.small import small_ids, small_model
from make.sparse import LENGTH, SMALL, run
from modeling.sparse import BlockMap
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PromptError
from restkv.lm import LM, load
from restkv.patterns import AShape, parse_prefill
from restkv.policies import FullCache, get_policy
from restkv.session import Session
from restkv.testing.watch import entries_of

# -- benches and commands


def test_policies_share_a_sparse_prompt_as_each_alone_would_read_it():
    lm, ids = LM(small_model(4), None), small_ids(LENGTH)
    policies = [get_policy(name, budget=40) for name in ("restkv", "h2o", "streamingllm")]
    policies += [FullCache(), get_policy("h2o", budget=40, granularity="query")]
    together = [Session(lm.engine, policy, [LENGTH], 4) for policy in policies]
    prefill_together(lm, together, ids, SMALL[0])
    for policy, session in zip(policies, together, strict=True):
        alone = run(lm.model, policy, ids, SMALL[0])
        assert torch.equal(alone.logits_BV, session.logits_BV)
        for ours, theirs in zip(session.cache.layers, alone.cache.layers, strict=True):
            for a, b in zip(entries_of(ours), entries_of(theirs), strict=True):
                assert a.pos == b.pos and torch.equal(a.k, b.k) and torch.equal(a.v, b.v)


@pytest.fixture(scope="module")
def recall() -> LM:
    return load(RECALL)


def test_fidelity_shows_what_a_sparse_prefill_costs_the_full_cache(recall, tmp_path):
    text = (RECALL / "story.txt").read_text(encoding="utf-8")
    plan = FidelityPlan(text, tuple(parse_methods("snapkv")), (64,), context=160, tail=4, windows=1, oracle=0)
    cost = {}
    for prefill in ("dense", "a-shape:block=32:sinks=4:local=32"):
        folder = run_plan(recall, replace(plan, prefill=prefill), tmp_path / prefill.partition(":")[0])
        assert read_manifest(folder)["arguments"]["prefill"] == prefill
        cost[prefill] = {row["method"]: row["kl"] for row in read_rows(folder)}
        shown = parts("fidelity", read_manifest(folder)["arguments"], read_rows(folder))
        (table,) = [part for part in shown if isinstance(part, Table)]
        assert [line[0] for line in table.lines] == (["snapkv"] if prefill == "dense" else ["full", "snapkv"])
    dense, sparse = cost.values()
    assert abs(dense["full"]) < 1e-6 and sparse["full"] > 1e-4
    assert sparse["snapkv"] != dense["snapkv"]


def test_benches_refuse_what_cannot_be_shared_and_what_is_unknown(recall, tmp_path):
    plan = FidelityPlan("Once", tuple(parse_methods("")), (64,), prefill="chunked")
    with pytest.raises(PromptError, match="prefill 'chunked' evicts while it reads"):
        run_plan(recall, plan, tmp_path)
    ruler = Plan(("niah_single",), (256,), tuple(parse_methods("")), (4.0,), 1, prefill="flexprefill:gamma=7")
    with pytest.raises(PromptError, match="gamma=7"):
        run_plan(recall, ruler, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ruler_reads_its_prompts_by_a_pattern(recall, monkeypatch):
    """Once for all policies; the answer is that of a generation whose prompt is read so."""
    frame, pattern, read = Frame(recall.tokenizer), parse_prefill("a-shape:block=32:sinks=1:local=1"), []
    choose = AShape.choose

    def spy(self: AShape, q_HLD: Tensor, *rest: Any) -> BlockMap:
        read.append(q_HLD.shape[1])
        return choose(self, q_HLD, *rest)

    monkeypatch.setattr(AShape, "choose", spy)
    sample = make_sample("niah_single", 300, 0, 0, frame)
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    policies = [FullCache(), get_policy("snapkv", budget=64)]
    rows = answer(recall, frame, sample, "aware", policies, pattern)
    assert read == [len(context + asked)] * recall.config.num_layers
    for policy, (_, row) in zip(policies, rows, strict=True):
        how = {"max_new_tokens": sample.max_new_tokens, "stop": ".", "prefill": pattern}
        assert row["output"] == recall.generate(context + asked, policy, **how).text


def test_the_command_takes_a_pattern(capsys):
    prompt = ["-p", "Anna has a red hat. " * 40, "--no-chat", "--max-new-tokens", "4", "--budget", "64"]
    assert main(["generate", *prompt, "--prefill", "vertical-slash:block=32:vertical=30:slash=50"]) == 0
    assert main(["generate", *prompt, "--prefill", "vertical-slash:columns=3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "restkv: error: prefill 'vertical-slash:columns=3': 'columns=3' is not OPTION=VALUE with one of"
    )

"""Fidelity: divergences from the full cache, errors of layers, and the oracle, each against a slow twin that really deletes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import restkv
from bench.quality.distance import Judged, Told, read
from bench.quality.fidelity import FidelityPlan, Questions, errors_by_layer
from bench.quality.kept import kept_masks
from bench.quality.oracle import Oracle, elimination_order
from bench.quality.outputs import (
    LayerTrace,
    attention_output,
    full_pass,
    observation,
    relative_error,
    tail_error,
    tail_errors,
)
from bench.quality.tasks import Frame, make_sample
from bench.report.kinds import progress
from bench.runs.folder import SAMPLES, read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from bench.runs.together import Together, prefill_together
from make.small import small_ids, small_model
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.lm import LM
from restkv.observe import Observation
from restkv.policies import FullCache, Policy
from restkv.session import Session

CONTEXT, TAIL = 40, 6
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"kv_heads": 1, "group": 4},
    "alone": {"kv_heads": 3, "group": 1},
    "windows": {"windows": (9, None)},
    "softcap": {"attn_softcap": 3.0},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def lm(request: pytest.FixtureRequest) -> LM:
    return LM(small_model(3, **request.param), None)


@pytest.fixture(scope="module")
def one() -> LM:
    return LM(small_model(3), None)


@pytest.fixture(scope="module")
def text() -> str:
    return (RECALL / "story.txt").read_text(encoding="utf-8")


def session_of(lm: LM, policy: Policy, ids: Sequence[int]) -> Session:
    session = Session(lm.engine, policy, [len(ids)], TAIL + 1, extends=True)
    prefill_together(lm, [session], ids)
    return session


def layer_errors(lm: LM, session: Session, layers: Sequence[LayerTrace], context: int) -> list[float] | None:
    return errors_by_layer(lm, [Together(session, [session.policy], [session.evictor], [0])], layers, context)[0]


def compare(session: Session, tail: Sequence[int], full_TV: Tensor) -> dict[str, float]:
    told = Told(torch.tensor(tail[1:]))
    told.see(0, full_TV.double().log_softmax(-1))
    judged = Judged(told)
    read(session, tail[:1], tail[1:], [judged])
    return judged.measures()


def slow_outputs(lm: LM, obs: Observation, keep_HC: Tensor) -> Tensor:
    """[W, E]: plain loops over queries and heads, entries that are not kept deleted before the softmax."""
    w_EHD = lm.model.blocks[obs.layer].output_weight().double()
    H, G, W = obs.q.shape[1], obs.group, obs.q.shape[2]
    out = torch.zeros(W, w_EHD.shape[0], dtype=torch.float64)
    for w in range(W):
        at = int(obs.q_pos[0, w])
        for h in range(H):
            start = 0 if obs.sliding_window is None else max(0, at - obs.sliding_window + 1)
            columns = [c for c in range(start, at + 1) if keep_HC[h, c]]
            k, v = obs.k[0, h // G, columns], obs.v[0, h // G, columns]
            logits = k @ obs.q[0, h, w] * obs.softmax_scale
            if obs.softcap is not None:
                logits = obs.softcap * torch.tanh(logits / obs.softcap)
            out[w] += w_EHD[:, h] @ (logits.softmax(0) @ v)
    return out


# -- next tokens


def test_the_full_cache_is_itself(lm: LM) -> None:
    ids = small_ids(CONTEXT + TAIL + 1)
    logits, layers = full_pass(lm, ids[:-1], TAIL)
    session = session_of(lm, FullCache(), ids[:CONTEXT])
    assert layer_errors(lm, session, layers, CONTEXT) == [0.0, 0.0]
    compared = compare(session, ids[CONTEXT:], logits)
    assert compared["kl"] == pytest.approx(0, abs=1e-9) and compared["top1"] == 1
    assert compared["nll"] == pytest.approx(compared["full_nll"], abs=1e-5)


def test_a_full_pass_gives_the_logits_of_its_last_tokens(lm: LM) -> None:
    ids = small_ids(CONTEXT)
    torch.testing.assert_close(full_pass(lm, ids, 5)[0], lm.logits(ids)[-5:], atol=1e-5, rtol=1e-5)


def test_divergences_are_those_of_the_distributions_as_they_are(one: LM) -> None:
    ids = small_ids(CONTEXT + TAIL + 1, seed=1)
    policy = restkv.SnapKV(budget=12, window=4)
    logits, _ = full_pass(one, ids[:-1], TAIL)
    compared = compare(session_of(one, policy, ids[:CONTEXT]), ids[CONTEXT:], logits)
    lone = Session(one.engine, policy, [CONTEXT], TAIL)
    lone.prefill([ids[:CONTEXT]])
    kl, same, nll, full_nll = 0.0, 0, 0.0, 0.0
    for step in range(TAIL):
        lone.feed(torch.tensor([ids[CONTEXT + step]]))
        ours = [x - math.log(sum(map(math.exp, lone.logits_BV[0].tolist()))) for x in lone.logits_BV[0].tolist()]
        theirs_V = one.logits(ids[: CONTEXT + step + 1])[-1].double().log_softmax(-1).tolist()
        kl += sum(math.exp(p) * (p - q) for p, q in zip(theirs_V, ours, strict=True))
        same += ours.index(max(ours)) == theirs_V.index(max(theirs_V))
        nll -= ours[ids[CONTEXT + step + 1]]
        full_nll -= theirs_V[ids[CONTEXT + step + 1]]
    assert compared["kl"] == pytest.approx(kl / TAIL, rel=1e-4) and compared["kl"] > 1e-3
    assert compared["top1"] == pytest.approx(same / TAIL)
    assert compared["nll"] == pytest.approx(nll / TAIL, rel=1e-5)
    assert compared["full_nll"] == pytest.approx(full_nll / TAIL, rel=1e-5)


# -- layers


@pytest.mark.parametrize("granularity", ("kv", "query"))
def test_layer_errors_are_those_of_deleting_what_was_evicted(lm: LM, granularity: str) -> None:
    ids = small_ids(CONTEXT + TAIL)
    _, layers = full_pass(lm, ids, TAIL)
    session = session_of(
        lm, restkv.ReSTKV(budget=9, window=3, budget_by="uniform", granularity=granularity), ids[:CONTEXT]
    )
    errors = layer_errors(lm, session, layers, CONTEXT)
    assert errors is not None
    for index, keep_HP in enumerate(kept_masks(session, CONTEXT)):
        assert keep_HP.sum(-1).tolist() == [9] * lm.config.num_heads
        obs = observation(lm, index, layers[index], len(ids))
        everything = torch.ones(len(keep_HP), len(ids), dtype=torch.bool)
        kept = torch.cat([keep_HP, everything[:, CONTEXT:]], 1)
        full, part = slow_outputs(lm, obs, everything), slow_outputs(lm, obs, kept)
        assert errors[index] == pytest.approx(float((part - full).norm() / full.norm()), rel=1e-9)
        torch.testing.assert_close(attention_output(lm, obs), full)


@settings(max_examples=20)
@given(
    st.sampled_from(list(MODELS.values())), st.sampled_from(("kv", "query")), st.integers(1, 4), st.integers(0, 1000)
)
def test_errors_of_many_sets_are_those_of_each(traits: dict[str, Any], granularity: str, sets: int, seed: int) -> None:
    lm, ids = LM(small_model(seed, **traits), None), small_ids(CONTEXT + TAIL, seed)
    _, layers = full_pass(lm, ids, TAIL)
    torch.manual_seed(seed)
    heads = lm.config.num_heads if granularity == "query" else 1
    keeps = [(torch.rand(heads, CONTEXT) < share / sets).expand(lm.config.num_heads, -1) for share in range(sets + 1)]
    for index, trace in enumerate(layers):
        obs = observation(lm, index, trace, len(ids))
        assert tail_errors(lm, obs, keeps) == pytest.approx([tail_error(lm, obs, keep) for keep in keeps], rel=1e-9)


def test_an_observation_of_an_earlier_place_has_its_queries_and_no_later_column(one: LM) -> None:
    ids = small_ids(CONTEXT + TAIL)
    _, layers = full_pass(one, ids, len(ids))
    _, short = full_pass(one, ids[:CONTEXT], 5)
    early, alone = observation(one, 1, layers[1], CONTEXT, 5), observation(one, 1, short[1], CONTEXT)
    assert early.q_pos.tolist() == alone.q_pos.tolist() == [list(range(CONTEXT - 5, CONTEXT))]
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(early, name), getattr(alone, name), atol=1e-5, rtol=1e-4)


def test_renumbered_positions_have_no_layer_error(one: LM) -> None:
    ids = small_ids(CONTEXT + TAIL)
    _, layers = full_pass(one, ids, len(ids))
    session = session_of(one, restkv.StreamingLLM(budget=9), ids[:CONTEXT])
    assert layer_errors(one, session, layers, CONTEXT) is None
    assert set(Oracle(one, layers, CONTEXT).gap(session, session.policy).values()) == {None}


# -- the oracle


def slow_elimination(lm: LM, obs: Observation, head: int, removable: int) -> list[int]:
    """Try every removal from scratch, keep the best, go on; heads of other groups stay whole and cancel."""
    C, G = obs.k.shape[2], obs.group
    keep = torch.ones(obs.q.shape[1], C, dtype=torch.bool)
    full = slow_outputs(lm, obs, keep)
    gone: list[int] = []
    while len(gone) < removable:
        errors = {}
        for column in range(removable):
            if column not in gone:
                trial = keep.clone()
                trial[head * G : (head + 1) * G, column] = False
                errors[column] = float((slow_outputs(lm, obs, trial) - full).square().sum())
        best = min(errors, key=lambda column: errors[column])
        keep[head * G : (head + 1) * G, best] = False
        gone.append(best)
    return gone


@pytest.mark.parametrize("layer", (0, 1))
def test_elimination_removes_what_a_trial_of_every_removal_would(lm: LM, layer: int) -> None:
    ids = small_ids(16, seed=5)
    _, layers = full_pass(lm, ids, 3)
    obs = observation(lm, layer, layers[layer], 16)
    order = elimination_order(lm, obs, 11)
    for head in range(lm.config.num_kv_heads):
        expected = slow_elimination(lm, obs, head, 11)
        hidden = (
            0 if obs.sliding_window is None else 16 - 3 - obs.sliding_window + 1
        )  # no query sees these: they go first, oldest first
        assert order[head, :hidden].tolist() == list(range(hidden))
        assert order[head, hidden:].tolist() == expected[hidden:]


def test_a_sink_that_takes_all_attention_is_kept_to_the_end(one: LM) -> None:
    """Its removal changes everything, while its odds a / (1 - a) are beyond any number: a trap for cancellation."""
    ids = small_ids(24, seed=2)
    _, layers = full_pass(one, ids, 4)
    obs = observation(one, 0, layers[0], 24)
    k = obs.k.clone()
    k[0, :, 5] = 400 * obs.q[0].unflatten(0, (2, -1)).mean((1, 2))
    obs = replace(obs, k=k)
    share = torch.softmax((obs.q[0].unflatten(0, (2, -1)) @ k[0, :, None].mT) * obs.softmax_scale, -1)[..., 5]
    assert float(share.max()) > 1 - 1e-12
    order = elimination_order(one, obs, 20)
    assert (order.sort(-1).values == torch.arange(20)).all()
    for head in range(2):
        assert order[head].tolist() == slow_elimination(one, obs, head, 20)
        assert 5 in order[head, -2:].tolist()


def test_the_oracle_is_at_least_as_good_as_any_policy_on_what_it_is_judged_by(one: LM) -> None:
    ids = small_ids(CONTEXT + TAIL, seed=4)
    _, layers = full_pass(one, ids, len(ids))
    oracle = Oracle(one, layers, CONTEXT)
    policies = (
        restkv.ReSTKV(budget=16, window=8, aggregate="indicator", pooling="none"),
        restkv.SnapKV(budget=16, window=8),
        restkv.Random(budget=16, window=8),
        restkv.ReSTKV(budget=16, window=8, budget_by="adakv"),
        restkv.ReSTKV(budget=16, window=8, granularity="query"),
    )
    for policy in policies:
        session = session_of(one, policy, ids[:CONTEXT])
        gap = oracle.gap(session, policy)
        for layer, keep_HP in enumerate(kept_masks(session, CONTEXT)):
            assert gap["future_error"][layer] < gap["error"][layer]
            assert gap["future_error"][layer] <= gap["window_error"][layer]
            assert 0 < gap["overlap"][layer] <= 1
            obs = observation(one, layer, layers[layer], len(ids), TAIL)
            kept = torch.cat([keep_HP, torch.ones(len(keep_HP), TAIL, dtype=torch.bool)], 1)
            assert gap["error"][layer] == pytest.approx(relative_error(one, obs, kept), rel=1e-12)


def test_an_oracle_keeps_as_many_entries_of_every_head_as_the_policy(one: LM) -> None:
    ids = small_ids(CONTEXT + TAIL, seed=4)
    _, layers = full_pass(one, ids, len(ids))
    oracle = Oracle(one, layers, CONTEXT)
    best = oracle._best(1, "future", 6, torch.tensor([9, 21]))
    assert best.sum(-1).tolist() == [9, 21] and best[:, -6:].all()
    assert (oracle._best(1, "future", 6, torch.tensor([21, 21]))[1] == best[1]).all()
    assert not (best[0] & ~oracle._best(1, "future", 6, torch.tensor([21, 21]))[0]).any()  # nested


# -- runs


def test_a_run_on_a_text_and_its_continuation(text: str, tmp_path: Path) -> None:
    lm = restkv.load(RECALL)
    methods = tuple(parse_methods("restkv,streamingllm,snapkv:granularity=query"))
    plan = FidelityPlan(text, methods, (16, 0.25), 80, 8, windows=2, oracle=1, oracle_context=40, layer_errors=True)
    run(lm, plan, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole")
    assert len(rows) == 2 * (1 + 3 * 2) + 3 * 2
    by_key = {row["key"]: row for row in rows}
    assert by_key["text/0/full/1.0"]["kl"] == pytest.approx(0, abs=1e-9)
    assert by_key["text/1/restkv/0.25"]["kept"] == 20 == by_key["text/1/restkv/0.25"]["entries"]
    assert by_key["oracle/0/restkv/0.25"]["kept"] == 10
    assert by_key["text/0/snapkv:granularity=query/16"]["kept"] <= 16
    assert by_key["text/0/restkv/16"]["kl"] > 0 and len(by_key["text/0/restkv/16"]["error"]) == lm.config.num_layers
    assert by_key["oracle/0/streamingllm/16"]["error"] is None
    part = tmp_path / "part"
    part.mkdir()
    for file in (tmp_path / "whole").iterdir():
        (part / file.name).write_bytes(file.read_bytes()[: -700 if file.name == SAMPLES else None])
    run(lm, plan, part)
    assert (part / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()


def test_budgets_that_come_to_the_same_entries_are_one(text: str, tmp_path: Path) -> None:
    lm, methods = restkv.load(RECALL), tuple(parse_methods("snapkv"))
    plan = FidelityPlan(text, methods, (20, 0.5, 0.25), context=80, tail=8, windows=2, oracle=1, oracle_context=40)
    rows = read_rows(run(lm, plan, tmp_path))
    assert len(rows) == progress("fidelity", read_manifest(tmp_path)["arguments"], rows)[1] == 2 * 3 + 1 * 2
    ours = sorted((row["part"], row["entries"]) for row in rows if row["method"] == "snapkv")
    assert ours == [("oracle", 10), ("oracle", 20), *[("text", 20)] * 2, *[("text", 40)] * 2]


def test_a_run_on_questions_judges_the_answers(tmp_path: Path) -> None:
    lm = restkv.load(RECALL)
    source = Questions(("niah_single", "vt"), seed=5)
    methods = tuple(parse_methods("restkv,random"))
    plan = FidelityPlan(source, methods, (0.25,), context=200, windows=3, oracle=1, oracle_context=150)
    run(lm, plan, tmp_path)
    rows = read_rows(tmp_path)
    assert len(rows) == progress("fidelity", read_manifest(tmp_path)["arguments"], rows)[1] == 2 * (3 * 3 + 2)
    by_key = {row["key"]: row for row in rows}
    assert by_key["text/vt/2/restkv/0.25"]["entries"] == 50 and by_key["oracle/vt/0/restkv/0.25"]["entries"] == 38
    assert by_key["text/niah_single/0/full/1.0"]["kl"] == pytest.approx(0, abs=1e-9)
    one = make_sample("niah_single", 200, 5, 0, Frame(lm.tokenizer))
    prompt = f"{one.context} {one.question} {one.answer_prefix}"
    answer = lm.encode(f"{prompt}{one.target}.")[len(lm.encode(prompt)) :]
    assert lm.tokenizer.decode(answer) == f"{one.target}."
    window = source.windows(lm, 200, 1)[0]
    assert window.prompt == lm.encode(prompt) and window.ids[window.context :] == answer
    assert window.tail == len(answer) - 1  # its first token is judged by the dense prefill
    # the full cache knows the codes (a wrong window would not), what has lost three quarters by chance does not
    nll = {
        name: sum(by_key[f"text/niah_single/{i}/{name}"]["nll"] for i in range(3)) / 3
        for name in ("full/1.0", "random/0.25")
    }
    assert nll["full/1.0"] < 0.2 < nll["random/0.25"]


def test_senseless_plans_are_refused(text: str, tmp_path: Path) -> None:
    lm = restkv.load(RECALL)
    few = FidelityPlan(text, tuple(parse_methods("restkv")), (16,), context=80, tail=8, windows=2, oracle=0)
    for changes, error, message in (
        ({"windows": 0}, PromptError, "windows 0: give at least 1"),
        ({"source": "Once upon"}, PromptError, r"the text has \d+ tokens; a window takes 88"),
        ({"windows": 10_000}, PromptError, "room for .* different windows, not for 10000"),
        ({"oracle": 3, "oracle_context": 40}, PromptError, "no more than windows and context"),
        ({"source": Questions(("niah_simple",))}, PromptError, "task 'niah_simple' is unknown"),
        ({"source": Questions(("vt",)), "context": 20}, PromptError, "task vt: length 20"),
        (
            {"budgets": (0.01,), "methods": tuple(parse_methods("streamingllm"))},
            PolicyError,
            "1 entries per head .*0.01 of 80",
        ),
    ):
        with pytest.raises(error, match=message):
            run(lm, replace(few, **changes), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.warns(RestKVWarning, match="3 windows of .* overlap, so that intervals come out too narrow"):
        run(lm, replace(few, windows=3, context=len(lm.encode(text)) - 20), tmp_path)


def test_the_command_on_another_checkpoint(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 9)
    sizes = "--context 96 --tail 8 --windows 2 --oracle 1 --oracle-context 40 --layer-errors".split()
    command = ["bench", "fidelity", str(stories260k), "--text", str(file), *sizes, "--out", str(tmp_path / "run")]
    assert main([*command, "--methods", "restkv,h2o", "--budgets", "16,0.5"]) == 0
    shown = capsys.readouterr().out
    assert "KL, nats/token" in shown and "Oracle gap at 40 tokens" in shown and "perplexity ratio" in shown
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["layers"] == 5 and manifest["arguments"]["budgets"] == [16, 0.5]
    assert [manifest["methods"][name]["policy"]["interval"] for name in ("restkv", "h2o")] == [None, None]
    always = [*command[:-1], str(tmp_path / "always"), "--methods", "h2o", "--budgets", "16", "--evict", "always"]
    assert main(always) == 0
    manifest = json.loads((tmp_path / "always" / "manifest.json").read_text())
    assert manifest["methods"]["h2o"]["policy"]["interval"] == 1
    capsys.readouterr()
    for bad, message in (
        (["--budgets", "0"], "--budgets '0': give whole numbers, or fractions"),
        (["--budgets", "1.5"], "--budgets '1.5'"),
        (["--evict", "never"], "--evict 'never' is not known; choose prompt or always"),
        (["--text", str(tmp_path / "none")], "none: cannot be read"),
        (["--tasks", "vt"], "two sources: give --text or --tasks, not both"),
    ):
        assert main([*command, *bad]) == 2
        assert message in capsys.readouterr().err

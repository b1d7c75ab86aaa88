"""Refits, by hypothesis: against plain least squares and a dense model (twins/refitted.py), and by what may not change.

Letters: B rows, M reference queries, n kept entries, D head dim, L tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.models import MODELS, model_of
from make.effort import many
from make.small import small_ids
from modeling.layers import Decoder
from restkv import refit, schedule
from restkv.engine import Engine
from restkv.errors import PolicyError, PromptError
from restkv.policies import KVzip, Policy, StreamingLLM, get_policy
from restkv.refit import REFITS, References, refit_head
from restkv.saving.store import load_session, save_session
from restkv.seen import Seen
from restkv.session import Session
from restkv.testing.dense import Dense
from restkv.testing.watch import positions, snapshot
from twins import probed, refitted

PROBES = ["window", "prompt", "prompt:5", "draft:3", "replay", "prompt+draft:3", "window+replay"]


def laws(examples: int) -> Callable[[Callable], Callable]:
    """A law over so many random cases, half of them under CI."""
    drawn = many(examples, 2)
    return lambda test: settings(max_examples=drawn, suppress_health_check=list(HealthCheck))(test)


# -- one head


@st.composite
def heads(draw: Callable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """share [M, n], values [n, D], outputs [M, D] and weights [M] of a softmax over more entries than are kept."""
    M, n, D, lost = (draw(st.integers(1, most)) for most in (30, 20, 4, 20))
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = draw(st.sampled_from([0.3, 3.0, 30.0])) * torch.randn(M, n + lost, generator=make, dtype=torch.double)
    if draw(st.booleans()):
        logits[:, 0] = -torch.inf  # seen by none
    a = logits.softmax(-1)
    v = torch.randn(n + lost, D, generator=make, dtype=torch.double)
    weight_M = torch.rand(M, generator=make, dtype=torch.double)
    if draw(st.booleans()):
        weight_M[0] = 0
    return a[:, :n], v[:n], a @ v, weight_M


@laws(150)
@given(heads(), st.sampled_from(["values", "bias", "both"]))
def test_a_heads_error_on_its_own_queries_never_grows(head: tuple[Tensor, ...], kind: str) -> None:
    share_Mn, v_nD, out_MD, weight_M = head
    new_nD, bias_n = refit_head(kind, *head)
    before, after = (
        refitted.error(share_Mn.numpy(), bias.numpy(), v.numpy(), out_MD.numpy(), weight_M.numpy())
        for bias, v in ((torch.zeros(len(v_nD)), v_nD), (bias_n, new_nD))
    )
    assert after <= before * (1 + 1e-9) + 1e-15
    assert bias_n.abs().max() <= refit.FARTHEST and (kind != "values" or not bias_n.any())
    assert kind != "bias" or torch.equal(new_nD, v_nD)


@laws(100)
@given(heads(), st.booleans())
def test_values_are_those_of_plain_least_squares(head: tuple[Tensor, ...], biased: bool) -> None:
    share_Mn, v_nD, out_MD, weight_M = head
    bias_n = torch.linspace(-1, 1, len(v_nD), dtype=torch.double) if biased else torch.zeros(len(v_nD)).double()
    mine_nD = refit._values(share_Mn, bias_n, v_nD, out_MD, weight_M)
    share, bias, v, out, weight = (x.numpy() for x in (share_Mn, bias_n, v_nD, out_MD, weight_M))
    theirs_nD = refitted.values(share, bias, v, out, weight, refit.RIDGE)
    np.testing.assert_allclose(mine_nD.numpy(), theirs_nD, rtol=1e-6, atol=1e-8)


@laws(80)
@given(heads(), st.sampled_from([5, refit.STEPS, 1_000]))
def test_biases_come_as_close_to_the_best_as_an_accelerated_descent_does(head: tuple[Tensor, ...], steps: int) -> None:
    """f(w_k) - f(w) <= 2 L |w_0 - w|^2 / (k + 1)^2 (Beck and Teboulle, 2009, theorem 4.4), f half of the squared miss."""
    share_Mn, _, _, weight_M = head
    a_Mn, start_n = share_Mn * weight_M[:, None], torch.ones_like(share_Mn[0])

    def left(w_n: Tensor) -> float:
        return float((a_Mn @ w_n - weight_M).square().sum()) / 2

    best_n = torch.from_numpy(refitted.nonnegative(a_Mn.numpy(), weight_M.numpy()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "STEPS", steps)
        patch.setattr(refit, "FARTHEST", 60.0)
        found_n = refit._biases(share_Mn, weight_M).exp()
    largest = float(torch.linalg.matrix_norm(a_Mn, 2)) ** 2
    far = float((start_n - best_n).square().sum())
    assert -1e-12 <= left(found_n) - left(best_n) <= 2 * 1.2 * largest * far / (steps + 1) ** 2 + 1e-12


@given(st.integers(0, 40), st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_queries_are_shared_out_evenly(total: int, sizes: list[int]) -> None:
    mine = refit._shared_out(total, sizes)
    assert sum(mine) == min(total, sum(sizes)) and all(a <= b for a, b in zip(mine, sizes, strict=True))
    theirs = refitted.shared_out(total, sizes)
    assert all(abs(a - b) <= 1 for a, b in zip(mine, theirs, strict=True))


def test_ten_questions_are_one_probe_and_leave_a_replay_its_half():
    def seen(probe: str, queries: int) -> Seen:
        return Seen(torch.empty(1, queries, 2), 0, probe=probe)

    parts = [seen("replay", 2048), seen("replay", 900), *[seen("questions", 30) for _ in range(10)]]
    assert refit._counts(200, parts) == [50, 50, *[10] * 10]
    assert refit._counts(800, parts) == [250, 250, *[30] * 10], "what questions cannot use goes to the replay"
    assert refit._counts(60, [seen("window", 32), seen("draft", 8)]) == [32, 8]


# -- models


@st.composite
def policies(draw: Callable) -> Policy:
    name = draw(st.sampled_from(["snapkv", "restkv", "kvzip", "adakv"]))
    options: dict[str, Any] = {"window": draw(st.integers(1, 4)), "sinks": draw(st.integers(0, 3))}
    if name in ("snapkv", "restkv"):
        options["budget_by"] = draw(st.sampled_from(["uniform", "global", "pyramid"]))
    budget = options["window"] + options["sinks"] + draw(st.integers(1, 9))
    probe, interval = draw(st.sampled_from(PROBES)), draw(st.sampled_from([None, 3]))
    kind = draw(st.sampled_from(REFITS[1:]))
    return get_policy(name, **options, budget=budget, probe=probe, interval=interval, refit=kind)


JOBS = st.tuples(MODELS, policies(), st.lists(st.integers(16, 34), min_size=1, max_size=3), st.integers(0, 2**20))
Job = tuple[dict[str, Any], Policy, list[int], int]


def read(model: Decoder, policy: Policy, prompts: list[list[int]], new: int = 0) -> Session:
    session = Session(Engine(model, "sdpa"), policy, list(map(len, prompts)), new)
    session.prefill(prompts)
    return session


def started(job: Job) -> tuple[Decoder, Policy, list[list[int]]]:
    traits, policy, lengths, seed = job
    return model_of(True, **traits), policy, [small_ids(length, seed + row) for row, length in enumerate(lengths)]


@laws(40)
@given(JOBS)
def test_decoding_is_that_of_a_dense_model_with_these_values_and_biases(job: Job) -> None:
    """Masked, compacted and dense agree, in batches and alone; what is chosen and the keys are what they are without a refit."""
    model, policy, prompts = started(job)
    tokens = torch.tensor(small_ids(8 * len(prompts), job[3])).view(8, -1)
    try:
        masked = read(model, policy, prompts, new=8)
    except PolicyError as error:
        assert "protected" in str(error)
        return
    plain = read(model, replace(policy, refit="none"), prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "COMPACT_EVERY", 1)
        compacted = read(model, policy, prompts, new=8)
    alone = [read(model, policy, [prompt], new=8) for prompt in prompts]
    heads = model.config.num_kv_heads
    texts = []
    for row, prompt in enumerate(prompts):
        text = Dense(model)
        text.run(prompt)
        for layer, (lists, unfitted) in enumerate(zip(snapshot(masked.cache), snapshot(plain.cache), strict=True)):
            for head, (entries, old) in enumerate(zip(lists[row * heads :], unfitted[row * heads :], strict=True)):
                if head < heads:
                    assert entries.pos == old.pos and torch.equal(entries.k, old.k)
                    text.replace(layer, head, entries.pos, entries.v, entries.bias)
        texts.append(text)
    for step, ids_B in enumerate([None, *tokens]):
        if ids_B is not None:
            for session in (masked, compacted):
                session.feed(ids_B)
            for row, session in enumerate(alone):
                session.feed(ids_B[row : row + 1])
        single_BV = torch.cat([session.logits_BV for session in alone])
        for session in (masked, compacted):
            assert float((session.logits_BV - single_BV).abs().max()) < 1e-6
        for row, text in enumerate(texts):
            if ids_B is not None:
                logits_V = text.run(ids_B[row : row + 1].tolist())
                assert float((logits_V - masked.logits_BV[row]).abs().max()) < 1e-6, step
            layers = [positions(lists[row * heads : (row + 1) * heads]) for lists in snapshot(masked.cache)]
            text.adopt([[set(of) for of in layer for _ in range(model.config.group)] for layer in layers])


@laws(20)
@given(JOBS)
def test_with_nothing_evicted_it_changes_nothing(job: Job) -> None:
    model, policy, prompts = started(job)
    fitted = read(model, replace(policy, budget=64), prompts)
    plain = read(model, replace(policy, budget=64, refit="none"), prompts)
    for mine, others in zip(snapshot(fitted.cache), snapshot(plain.cache), strict=True):
        for a, b in zip(mine, others, strict=True):
            assert a.pos == b.pos and torch.equal(a.k, b.k) and torch.equal(a.v, b.v) and not a.bias.any()


@laws(40)
@given(JOBS.map(lambda job: (job[0], job[1], job[2][:1], job[3])))
def test_references_are_those_of_a_dense_model_that_reads_everything(job: Job) -> None:
    model, policy, (prompt,) = started(job)
    found: list[References] = []
    make = refit.references

    def spy(*args: Any) -> References | None:
        made = make(*args)
        assert made is not None
        found.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("restkv.evict.references", spy)
        try:
            read(model, policy, [prompt])
        except PolicyError as error:
            assert "protected" in str(error)
            return
    L, texts = len(prompt), {}
    for part in policy.probe.split("+"):
        (view,) = probed.views(model, part, prompt, policy.window, probed.Settings(2048, 64))
        texts[part] = view.text
    longest = max(texts.values(), key=lambda text: text.length)
    layers = [n for n, budget in enumerate(policy.layer_budgets(L, model.config.num_layers)) if budget < L]
    for layer, of in zip(layers, found, strict=True):
        assert not any(x.untyped_storage().nbytes() for x in (of.at.k, of.at.v, of.at.pos)), "entries are kept alive"
        for m, (position, stop) in enumerate(zip(of.at.q_pos[0].tolist(), of.stop_m.tolist(), strict=True)):
            text = longest if position >= L else next(iter(texts.values()))
            for head in range(model.config.num_heads):
                torch.testing.assert_close(of.at.q[0, head, m], text.q[layer][position, head], rtol=1e-6, atol=1e-8)
                gap = position - stop if stop <= position else 0
                kv = head // model.config.group
                lse, out_D, weight = refitted.reference(text, layer, kv, position, head, L, gap)
                np.testing.assert_allclose(of.weight_Hm[head, m], weight, rtol=1e-6, atol=1e-8)
                if weight:
                    np.testing.assert_allclose(of.lse_Hm[head, m], lse, rtol=1e-6, atol=1e-8)
                    np.testing.assert_allclose(of.out_HmD[head, m], out_D, rtol=1e-6, atol=1e-8)


def test_a_saved_session_and_a_fork_carry_it(tmp_path: Path) -> None:
    model = model_of(True, softcap=None, seed=0, windows=(None, 9), kv_heads=2, group=2, head_dim=6, hidden=12)
    policy = KVzip(8, window=2, sinks=1, refit="both", interval=3)
    session = read(model, policy, [small_ids(30, 1)], new=8)
    assert any(entries.bias.any() for layer in snapshot(session.cache) for entries in layer)
    save_session(session, tmp_path / "a.safetensors", {})
    back, _ = load_session(Engine(model, "sdpa"), tmp_path / "a.safetensors")
    fork = session.fork(8)
    for token in small_ids(8, 2):
        logits = []
        for one in (session, back, fork):
            one.feed(torch.tensor([token]))
            logits.append(one.logits_BV)
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KVzip(8, refit="some"), "refit 'some': choose from none, values, bias, both"),
        (lambda: KVzip(64, granularity="query", refit="both"), 'choose granularity="kv", or leave it at none'),
        (lambda: StreamingLLM(8, sinks=2, refit="both"), "streamingllm observes no queries to fit anything to"),
    ],
)
def test_what_cannot_be_refitted_is_refused(make: Callable[[], Policy], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        make()


def test_a_chunked_prefill_refuses_it() -> None:
    model = model_of(True, softcap=None, seed=0, windows=(None,), kv_heads=1, group=1, head_dim=6, hidden=12)
    policy = get_policy("snapkv", budget=8, window=2, refit="values")
    with pytest.raises((PolicyError, PromptError), match="refit 'values': a chunked prefill evicts before"):
        Session(Engine(model, "sdpa"), policy, [30], 4, prefill="chunked", chunk=8)

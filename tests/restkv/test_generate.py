"""Tokens: against an argmax over dense logits, batches against rows alone, compiled steps against eager ones.

Letters: B batch rows, L prompt length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import restkv
from bench.quality.teacher_forcing import logprobs
from make.small import VOCAB, small_ids, small_lm, small_model
from restkv.lm import LM
from restkv.policies import H2O, FullCache, Policy, ReSTKV, SnapKV, StreamingLLM
from restkv.session import Session

PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def lm(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


def greedy(lm: LM, ids: list[int], count: int) -> list[int]:
    """Argmax of the dense logits over everything so far, token by token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(lm.logits(ids)[-1].argmax()))
    return ids[-count:]


def test_greedy_tokens_are_the_argmax_of_dense_logits():
    lm, ids = small_lm(windows=(5, None), group=3), small_ids(20)
    done = lm.generate(ids, FullCache(), max_new_tokens=12)
    assert done.tokens == greedy(lm, ids, 12)
    assert done.text == ""
    assert done.finish_reason == "length"


@pytest.mark.filterwarnings("ignore::modeling.errors.RestKVWarning")  # the window is longer than the prompt of 1
@pytest.mark.parametrize(
    "policy",
    [
        FullCache(),
        ReSTKV(budget=12, window=4, interval=5),
        ReSTKV(budget=12, window=4, interval=5, granularity="query", budget_by="global"),
        H2O(budget=12, recent=4),
        StreamingLLM(budget=12),
    ],
    ids=lambda policy: f"{policy.name}-{policy.granularity}",
)
def test_a_row_of_a_batch_is_the_prompt_alone(policy):
    """Greedy tokens in float32, whatever the neighbours' lengths; logits of the teacher-forced rows within 1e-5."""
    lm = small_lm(windows=(9, None))
    prompts = [small_ids(length, seed=length) for length in (31, 1, 17, 8)]
    batch = lm.generate(prompts, policy, max_new_tokens=20)
    for prompt, row in zip(prompts, batch, strict=True):
        assert row.tokens == lm.generate(prompt, policy, max_new_tokens=20).tokens
    together = Session(lm.engine, policy, [len(ids) for ids in prompts], 20)
    together.prefill(prompts)
    singles = [Session(lm.engine, policy, [len(ids)], 20) for ids in prompts]
    for session, ids in zip(singles, prompts, strict=True):
        session.prefill([ids])
    for step in range(20):
        alone_BV = torch.cat([session.logits_BV for session in singles])
        assert float((together.logits_BV - alone_BV).abs().max()) < 1e-5
        tokens = [row.tokens[step] for row in batch]
        together.feed(torch.tensor(tokens))
        for session, token in zip(singles, tokens, strict=True):
            session.feed(torch.tensor([token]))


def test_chunks_make_the_tokens_of_a_dense_prefill():
    lm, ids = small_lm(windows=(6, None)), small_ids(40)
    dense = lm.generate(ids, FullCache(), max_new_tokens=10)
    for chunk in (1, 7, 40, 100):
        steps: list[tuple[int, int]] = []
        chunked = {"prefill": "chunked", "chunk": chunk, "progress": lambda *step, steps=steps: steps.append(step)}
        assert lm.generate(ids, FullCache(), max_new_tokens=10, **chunked).tokens == dense.tokens
        assert steps == [(min(done, len(ids)), len(ids)) for done in range(chunk, len(ids) + chunk, chunk)]


def test_rows_end_on_their_own_and_the_others_go_on():
    lm, prompts = small_lm(), [small_ids(9), small_ids(14, seed=1), small_ids(5, seed=2)]
    free = lm.generate(prompts, FullCache(), max_new_tokens=15)
    drawn = [set(row.tokens) for row in free]
    # An id that some rows draw and some do not, as late as possible.
    eos = max((t for t in drawn[0] if not all(t in ids for ids in drawn)), key=free[0].tokens.index)
    lm.config = dataclasses.replace(lm.config, eos_token_ids=(eos, VOCAB + 7))
    done = lm.generate(prompts, FullCache(), max_new_tokens=15)
    ended = 0
    for row, plain in zip(done, free, strict=True):
        if eos in plain.tokens:
            assert row.finish_reason == "eos"
            assert row.tokens == plain.tokens[: plain.tokens.index(eos) + 1]
            ended += 1
        else:
            assert row.finish_reason == "length"
            assert row.tokens == plain.tokens
    assert 0 < ended < 3
    assert done[0].stats.new_tokens == [len(row.tokens) for row in done]
    ignoring = lm.generate(prompts, FullCache(), max_new_tokens=15, ignore_eos=True)
    assert [row.tokens for row in ignoring] == [row.tokens for row in free]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "policy", [FullCache(), ReSTKV(budget=16, window=4, interval=7), H2O(budget=12), StreamingLLM(budget=10)], ids=str
)
def test_tokens_drawn_before_any_is_read_are_the_same(policy, temperature, monkeypatch):
    """What a GPU does: rows end on the device, the host finds out later, and tokens, caches and evictions stay as they are."""
    prompts, options = [small_ids(n, seed=n) for n in (9, 21, 14)], {"temperature": temperature, "seed": 3}
    free = small_lm().generate(prompts, policy, max_new_tokens=30, **options)
    lm = small_lm(eos=(free[0].tokens[6], free[2].tokens[17]))
    made, lengths = {}, []
    draw = Session.draw

    def watched(*arguments):
        drawn_NB = draw(*arguments)
        lengths.append(len(drawn_NB))
        return drawn_NB

    monkeypatch.setattr(Session, "draw", watched)
    for burst in (1, 5, 64):
        lm._burst, lengths[:] = burst, []
        made[burst] = lm.generate(prompts, policy, max_new_tokens=30, **options)
        assert (max(lengths) > 1) == (burst > 1 and policy.interval > 1)
    for burst in (5, 64):
        for one, other in zip(made[1], made[burst], strict=True):
            assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
            held = ("seen", "kept", "max_kept", "live_bytes", "allocated_bytes", "evictions", "new_tokens")
            assert [getattr(one.stats, name) for name in held] == [getattr(other.stats, name) for name in held]
    assert len({len(row.tokens) for row in made[1]}) > 1, "rows are to end at different times"


def test_seeds_repeat_and_rows_do_not_depend_on_each_other():
    lm, prompts = small_lm(), [small_ids(9), small_ids(14, seed=1)]
    how = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 9, "seed": 5}
    first, second = (lm.generate(prompts, FullCache(), **how) for _ in range(2))
    assert [row.tokens for row in first] == [row.tokens for row in second]
    for row, prompt in enumerate(prompts):
        alone = lm.generate(prompt, FullCache(), **{**how, "seed": 5 + row})
        assert alone.tokens == first[row].tokens
    other = lm.generate(prompts, FullCache(), **{**how, "seed": 6})
    assert [row.tokens for row in other] != [row.tokens for row in first]


def test_prompts_come_as_text_ids_or_lists_of_either(lm):
    ids = lm.tokenizer.encode(PROMPT)
    single = lm.generate(PROMPT, FullCache(), max_new_tokens=6)
    assert lm.generate(ids, FullCache(), max_new_tokens=6).tokens == single.tokens
    both = lm.generate([PROMPT, ids], FullCache(), max_new_tokens=6)
    assert [row.tokens for row in both] == [single.tokens] * 2
    assert isinstance(lm.generate([PROMPT], FullCache(), max_new_tokens=1), list)


@pytest.mark.parametrize(("interval", "high_water"), [(4, 29), (1, 24), (3, 31), (7, None), (9, 40), (40, None)])
@torch.no_grad()
def test_pools_never_grow_however_rounds_and_compactions_fall(interval, high_water):
    """Rounds that only mark, compactions that find no row over its mark: a larger pool would be a new graph."""
    lm, ids = small_lm(), small_ids(50)
    policy = ReSTKV(budget=20, window=4, interval=interval, high_water=high_water)
    session = Session(lm.engine, policy, [len(ids)], 150)
    session.prefill([ids])
    reserved = session.cache.reserved_bytes
    for token in small_ids(150, seed=1):
        session.feed(torch.tensor([token]))
    assert session.evictor.evictions >= 3
    assert session.cache.reserved_bytes == reserved


@torch.no_grad()
def test_a_high_water_mark_is_for_what_is_appended():
    """docs/policies.md: a dense prompt and a first chunk come back to their budget, all later tokens may pile up to the mark."""

    def held(session: Session) -> int:
        (count,) = {int(n) for layer in session.cache.layers for n in layer.live_counts().flatten()}
        return count

    engine, policy = small_lm().engine, ReSTKV(budget=20, window=4, interval=1, high_water=40, budget_by="uniform")
    dense = Session(engine, policy, [30], 40, extends=True)
    dense.prefill([small_ids(30)])
    assert held(dense) == 20
    for chunk, count in ((10, 30), (25, 25)):
        chunked = Session(engine, policy, [30], 40, prefill="chunked", chunk=chunk)
        chunked.prefill([small_ids(30)])
        chunked.cache.refresh()
        assert held(chunked) == count
    dense.extend([small_ids(12)])
    counts = []
    for token in small_ids(10):
        dense.feed(torch.tensor([token]))
        counts.append(held(dense))
    assert counts == [33, 34, 35, 36, 37, 38, 39, 40, 20, 21]


@torch.no_grad()
def test_a_chunk_counts_as_many_tokens_as_its_longest_row():
    """Row 1 gets 2 tokens and loses them again: row 0 has had its 6."""
    session = Session(small_lm().engine, SnapKV(budget=10, window=4, interval=6), [20, 20], 9, extends=True)
    session.prefill([small_ids(20)] * 2)
    session.extend([small_ids(3), small_ids(1)])
    assert session.kept()[0] == [13, 11]
    session.extend([small_ids(3), small_ids(1)])
    assert session.kept()[0] == [10, 10]


def test_a_policy_that_observes_no_query_evicts_prompts_in_sliding_window_layers_too():
    """StreamingLLM's preset "paper": no window, and no query remembered for later, but the layer asks what is in sight."""
    lm = LM(small_model(windows=(9, None)), None)
    policy = StreamingLLM(budget=12, positions="original", interval=None)
    session = Session(lm.engine, policy, [30], 1)
    session.prefill([small_ids(30)])
    # Sinks 0 to 3 and 22 to 29; out of sight of position 30 in the first layer (22 is the oldest it sees), but protected.
    assert session.kept() == [[12], [12]]


@torch.no_grad()
def test_log_probabilities_of_appended_tokens_are_those_of_reading_them_one_by_one():
    """Ragged rows, chunks shorter than they are, and evictions between chunks; the dense twin where nothing is evicted."""
    lm, prompts, rows = small_lm(), [small_ids(20), small_ids(13, seed=1)], [small_ids(9, seed=2), small_ids(4, seed=3)]
    for policy in (FullCache(), SnapKV(budget=10, window=4, interval=None), SnapKV(budget=10, window=4, interval=3)):
        session = Session(lm.engine, policy, [20, 13], 9, chunk=3, extends=True)
        session.prefill(prompts)
        said = logprobs(session, rows)
        for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
            alone = Session(lm.engine, policy, [len(prompt)], 9, chunk=3, extends=True)
            alone.prefill([prompt])
            slow = []
            for start in range(0, len(ids), 3):
                calm = alone.fork(9)  # reads the chunk token by token, without evicting within it
                calm.schedule.interval = None
                for token in ids[start : start + 3]:
                    slow.append(calm.logits_BV[0].double().log_softmax(-1)[token])
                    calm.feed(torch.tensor([token]))
                alone.extend([ids[start : start + 3]])
            torch.testing.assert_close(said[row], torch.stack(slow).float(), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(session.logits_BV[row], alone.logits_BV[0], atol=2e-5, rtol=1e-5)
            if isinstance(policy, FullCache):
                dense_TV = lm.logits(prompt + ids)[len(prompt) - 1 : -1].double().log_softmax(-1)
                dense_T = dense_TV.gather(1, torch.tensor(ids)[:, None])[:, 0]
                torch.testing.assert_close(said[row], dense_T.float(), atol=2e-5, rtol=1e-5)


# -- compiled


COMPILED: dict[str, tuple[Policy, dict[str, Any]]] = {
    "query sets, one budget for all layers": (
        ReSTKV(budget=20, window=4, interval=8, granularity="query", budget_by="global"),
        {"windows": (9, None)},
    ),
    "every step, accumulated": (H2O(budget=20, recent=4), {}),
    "slots as positions": (StreamingLLM(budget=20), {"thetas": (100.0, 7.0)}),
    "a budget per layer": (SnapKV(budget=(12, 30), window=4, interval=8), {"attn_softcap": 3.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_tokens_are_the_eager_ones(case):
    """Ragged batches of two sizes of prompts: a graph for the step and one for the eviction."""
    torch._dynamo.reset()
    policy, traits = COMPILED[case]
    eager, compiled = (small_lm(backend, group=3, head_dim=16, **traits) for backend in ("sdpa", "flex"))
    first = 1 + compiled.engine.masks(policy)
    for lengths, graphs in (((33, 5), first), ((50, 49), 0)):
        prompts = [small_ids(length, seed=length) for length in lengths]
        want = eager.generate(prompts, policy, max_new_tokens=40)
        got = compiled.generate(prompts, policy, max_new_tokens=40)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        assert got[0].stats.graphs == graphs
        assert got[0].stats.kept == want[0].stats.kept
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("budget_by", ["uniform", "global"])
def test_pages_without_a_living_entry_are_not_read(budget_by):
    """The newest 20 entries move on through pages of 32, and leave them behind until the compaction."""
    torch._dynamo.reset()
    policy = StreamingLLM(20, sinks=0, positions="original", interval=2, compact_every=100, budget_by=budget_by)
    eager, compiled = (
        Session(small_lm(backend, group=3, head_dim=16).engine, policy, [50, 9], 200) for backend in ("sdpa", "flex")
    )
    prompts, left_out = [small_ids(50), small_ids(9, seed=1)], 0
    for session in (eager, compiled):
        session.prefill(prompts)
    for step in range(110):
        ids_B = torch.tensor(small_ids(2, seed=step))
        for session in (eager, compiled):
            session.feed(ids_B)
        torch.testing.assert_close(compiled.logits_BV, eager.logits_BV, atol=2e-5, rtol=1e-5)
        left_out = max(left_out, *(int(layer.skipped.max()) for layer in compiled.cache.layers))
    assert left_out >= 2
    assert all(not layer.skipped.any() for layer in compiled.cache.layers), "compacted at 100, and ten tokens since"
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_chunks_are_the_eager_ones():
    torch._dynamo.reset()
    policy = ReSTKV(budget=20, window=4, interval=8)
    eager, compiled = (small_lm(backend, group=3, head_dim=16, windows=(9, None)) for backend in ("sdpa", "flex"))
    how = {"max_new_tokens": 20, "prefill": "chunked", "chunk": 16}
    for lengths, graphs in (((70, 5), 4), ((16, 33), 0)):  # a chunk of one row; a step of all rows, and their eviction
        prompts = [small_ids(length, seed=length) for length in lengths]
        want = eager.generate(prompts, policy, **how)
        got = compiled.generate(prompts, policy, **how)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        assert got[0].stats.graphs <= graphs
    torch._dynamo.reset()

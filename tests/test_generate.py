"""Generation: tokens against an argmax over dense logits, batches against rows alone, stops, ends, statistics, refusals.

Letters: B batch rows, L prompt length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCAB, small_ids, small_model

import restkv
from modeling.errors import RestKVWarning
from modeling.pool import PagePool
from restkv.errors import PolicyError, PromptError
from restkv.generate import Session
from restkv.lm import LM
from restkv.policies import H2O, FullCache, ReSTKV, SnapKV, StreamingLLM
from restkv.results import Decoding

PROMPT = "Once upon a time, there was a little girl named Lily."


def small_lm(backend: str = "sdpa", eos: tuple[int, ...] = (), **traits) -> LM:
    lm = LM(small_model(**traits), None, backend)
    lm.config = dataclasses.replace(lm.config, eos_token_ids=eos)
    return lm


@pytest.fixture(scope="module")
def lm(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


def greedy(lm: LM, ids: list[int], count: int) -> list[int]:
    """Argmax of the dense logits over everything so far, token by token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(lm.logits(ids)[-1].argmax()))
    return ids[-count:]


# -- tokens


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
        assert lm.generate(ids, FullCache(), max_new_tokens=10, prefill="chunked", chunk=chunk).tokens == dense.tokens


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
    assert session.evictions >= 3
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
        said = session.logprobs(rows)
        for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
            alone = Session(lm.engine, policy, [len(prompt)], 9, chunk=3, extends=True)
            alone.prefill([prompt])
            slow = []
            for start in range(0, len(ids), 3):
                calm = alone.fork(9)  # reads the chunk token by token, without evicting within it
                calm._interval = None
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


# -- text


@pytest.fixture(scope="module")
def story(lm) -> restkv.lm.Generation:
    return lm.generate(PROMPT, FullCache(), max_new_tokens=48)


def test_pieces_of_a_stream_add_up_to_the_text(lm, story):
    stream = lm.stream(PROMPT, FullCache(), max_new_tokens=48)
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.generation
    pieces = list(stream)
    assert len(pieces) > 20
    assert "".join(pieces) == stream.generation.text == story.text == lm.tokenizer.decode(story.tokens)
    assert stream.generation.tokens == story.tokens


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(3, 511), min_size=1, max_size=8))
def test_text_is_what_the_tokens_decode_to_wherever_they_end(lm, tokens):
    """Random tokens: bytes of half characters, spaces at the end."""
    row = lm.answer(Decoding(max_new_tokens=len(tokens), ignore_eos=True))
    pieces = [row.push(token) for token in tokens]
    assert row.reason == "length"
    assert "".join(pieces) == row.text == lm.tokenizer.decode(tokens)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_stop_strings_end_the_text_wherever_they_fall(lm, story, data):
    """Stops cut out of the text at random, across tokens too, and one that never comes; nothing of them is streamed."""
    text = story.text
    starts = data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=2))
    stops = [text[at : at + data.draw(st.integers(1, 14))] for at in starts] + ["red kite"]
    stream = lm.stream(PROMPT, FullCache(), max_new_tokens=48, stop=stops)
    pieces = list(stream)
    done = stream.generation
    # The first stop to be complete ends it; of several completed by the same token, the one that starts first.
    # A line break is a byte in this vocabulary: the bytes that follow decide what it becomes, so it is certain a token later.
    decoded = [lm.tokenizer.decode(story.tokens[:n]).removesuffix("\n") for n in range(len(story.tokens) + 1)]
    first = next(n for n, so_far in enumerate(decoded) if any(stop in so_far for stop in stops))
    assert done.finish_reason == "stop"
    assert done.tokens == story.tokens[:first]
    assert done.text == text[: min(at for at in (decoded[first].find(stop) for stop in stops) if at >= 0)]
    assert "".join(pieces) == done.text


def test_text_held_back_for_a_stop_comes_out_when_it_does_not_follow(lm, story):
    almost = story.text[5:12] + "#"
    pieces = list(lm.stream(PROMPT, FullCache(), max_new_tokens=48, stop=almost))
    assert "".join(pieces) == story.text
    ending = story.text[-3:] + "#"  # held back until the very end
    done = lm.generate(PROMPT, FullCache(), max_new_tokens=48, stop=[ending, ""])
    assert done.text == story.text
    assert done.finish_reason == "length"


# -- statistics


@pytest.mark.parametrize(
    "policy",
    [
        FullCache(),
        ReSTKV(budget=24, window=8, interval=6, budget_by="uniform"),
        ReSTKV(budget=24, window=8, interval=6),
        SnapKV(budget=24, window=8, interval=None),
        ReSTKV(budget=16, window=8, interval=6, granularity="query"),
    ],
    ids=lambda p: f"{p.name}-{p.granularity}-{p.interval}-{p.allocation.name}",
)
def test_statistics_are_what_the_cache_holds(policy):
    lm, lengths, new = small_lm(), (50, 11), 21
    c, prompts = lm.config, [small_ids(length) for length in lengths]
    stats = lm.generate(prompts, policy, max_new_tokens=new)[0].stats
    session = Session(lm.engine, policy, lengths, new)
    session.prefill(prompts)
    rows = lm.generate(prompts, policy, max_new_tokens=new)
    most, evictions = 0, 0
    for step in range(new - 1):  # the last token is never fed
        before = [layer.live_counts() for layer in session.cache.layers]
        most = max(most, *(int(count_BK.max()) for count_BK in before))
        session.feed(torch.tensor([row.tokens[step] for row in rows]))
        evictions += any(
            (layer.live_counts() <= b).any() for layer, b in zip(session.cache.layers, before, strict=True)
        )
    kept = [layer.live_counts() for layer in session.cache.layers]
    assert (stats.method, stats.budget) == (policy.name, policy.budget)
    assert stats.prompt_tokens == list(lengths)
    assert stats.new_tokens == [new, new]
    assert stats.seen == [length + new - 1 for length in lengths]
    assert stats.kept == [count_BK.double().mean(-1).tolist() for count_BK in kept]
    assert stats.evictions == evictions
    assert (evictions > 0) == (policy.budget is not None and policy.interval is not None)
    slot = 2 * c.head_dim * 4 + 4 + (c.group if policy.granularity == "query" else 0)
    assert stats.live_bytes == sum(int(count_BK.sum()) for count_BK in kept) * slot
    pages = sum(len(pages) for layer in session.cache.layers for pages in layer.lists)
    assert stats.allocated_bytes == pages * 32 * slot
    assert stats.full_bytes == sum(stats.seen) * c.num_layers * c.num_kv_heads * 2 * c.head_dim * 4
    assert most <= stats.max_kept <= most + 1
    if (
        policy.budget is not None
        and policy.interval is not None
        and policy.granularity == "kv"
        and not policy.allocation.ragged
    ):
        assert stats.max_kept == policy.budget + policy.interval
    assert stats.graphs == 0


def test_times_and_memory_are_measured(lm):
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    stats = lm.generate(PROMPT, FullCache(), max_new_tokens=30).stats
    elapsed = time.perf_counter() - started
    assert 0 < stats.tpot_s < stats.ttft_s + elapsed
    assert stats.ttft_s + 29 * stats.tpot_s / 4 < elapsed
    assert 29 / elapsed < stats.tokens_per_s < 4 / stats.tpot_s
    assert before / 2 < stats.peak_bytes < psutil.virtual_memory().total
    assert set(stats.asdict()) == {field.name for field in dataclasses.fields(stats)}
    one = lm.generate(PROMPT, FullCache(), max_new_tokens=1).stats
    assert (one.tpot_s, one.tokens_per_s, one.new_tokens) == (0.0, 0.0, [1])


def test_peak_memory_sees_what_a_call_takes():
    """60 MB of keys and values."""
    lm = small_lm(head_dim=128, kv_heads=12, group=1)
    ids = small_ids(2500)
    small = lm.generate(ids[:10], FullCache(), max_new_tokens=1).stats
    large = lm.generate(ids, FullCache(), max_new_tokens=1).stats
    assert large.live_bytes > 60e6
    assert large.peak_bytes - small.peak_bytes > large.live_bytes


# -- log-probabilities


def test_logprobs_are_those_of_the_dense_logits(lm):
    context = lm.tokenizer.encode(PROMPT)
    continuations = [" She loved to play", [5, 6, 7, 8, 9], "!"]
    got = lm.logprobs(context, continuations)
    for continuation, value in zip(continuations, got, strict=True):
        ids = lm.encode_continuation(continuation)
        logp_LV = lm.logits(context + ids).double().log_softmax(-1)
        want = sum(float(logp_LV[len(context) - 1 + i, token]) for i, token in enumerate(ids))
        assert value == pytest.approx(want, abs=1e-4)
    assert got[0] > got[1]


@pytest.mark.parametrize(
    "policy", [ReSTKV(budget=10, window=4, interval=3), H2O(budget=10, recent=4), StreamingLLM(budget=10)]
)
def test_logprobs_of_a_compressed_context_do_not_depend_on_the_other_continuations(policy):
    lm, context = small_lm(), small_ids(33)
    continuations = [small_ids(length, seed=length) for length in (12, 1, 7)]
    together = lm.logprobs(context, continuations, policy)
    assert together == [lm.logprobs(context, [ids], policy)[0] for ids in continuations]
    assert together[::-1] == lm.logprobs(context, continuations[::-1], policy)
    session = Session(lm.engine, policy, [len(context)], 12)
    session.prefill([context])
    total = 0.0
    for token in continuations[0]:
        total += float(session.logits_BV[0].log_softmax(-1)[token])
        session.feed(torch.tensor([token]))
    assert together[0] == pytest.approx(total, abs=1e-5)
    assert together[0] != lm.logprobs(context, continuations[:1])[0]


@pytest.mark.parametrize("length", [63, 64, 200])
@pytest.mark.parametrize(
    "policy",
    [
        FullCache(),
        ReSTKV(budget=40, window=4, interval=3),
        ReSTKV(budget=40, window=4, interval=3, budget_by="global"),
        SnapKV(budget=40, window=4, interval=None),
        H2O(budget=40, granularity="query"),
    ],
    ids=lambda policy: f"{policy.name}-{policy.interval}-{policy.allocation.name}",
)
def test_forks_of_logprobs_find_pages_ready(policy, length, monkeypatch):
    """However long the continuations: a pool that grows is a new graph."""
    lm = small_lm()
    monkeypatch.setattr(PagePool, "grow", lambda pool, count: pytest.fail(f"{count} more pages"))
    lm.logprobs(small_ids(length), [small_ids(70), small_ids(3), small_ids(40)], policy)


@pytest.mark.slow
def test_logprobs_compile_one_graph():
    torch._dynamo.reset()
    lm, counted = small_lm("flex"), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    lm.logprobs(small_ids(63), [small_ids(7), small_ids(1), small_ids(40)])
    assert counted["unique_graphs"] - before == 1
    torch._dynamo.reset()


# -- refusals and remarks


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ("", {}, "prompt is empty"),
        (["Once", ""], {}, "prompt is empty"),
        ([[1, 2], []], {}, "prompt is empty"),
        ([1, 512, 2], {}, "token id 512 at place 1"),
        ([1, -1], {}, "token id -1 at place 1"),
        ([[1], [3, 600]], {}, "token id 600 at place 1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"prefill": "sparse"}, "prefill 'sparse'"),
        ([1], {"prefill": "chunked", "chunk": 0}, "chunk=0"),
    ],
)
def test_impossible_calls_are_refused_in_one_line(lm, prompt, options, words):
    with pytest.raises(PromptError, match=words) as error:
        lm.generate(prompt, FullCache(), **options)
    assert "\n" not in str(error.value)


def test_text_needs_a_tokenizer():
    for call in (lambda lm: lm.generate("hello"), lambda lm: lm.logprobs([1], ["hello"])):
        with pytest.raises(PromptError, match="no tokenizer"):
            call(small_lm())


def test_protected_entries_that_do_not_fit_are_refused(lm):
    policy = ReSTKV(budget=20, window=8, protect=((0, 15),))
    with pytest.raises(PolicyError, match="budget 20 is smaller than the 23 protected entries"):
        lm.generate(list(range(5, 45)), policy, max_new_tokens=1)
    lm.generate(list(range(5, 25)), policy, max_new_tokens=1)  # 20 tokens: nothing has to go


@pytest.mark.parametrize(("span", "at"), [((14, 30), 28), ((25, 40), 40)])
@torch.no_grad()
def test_a_span_that_outgrows_the_budget_is_refused_once_it_does(span, at):
    """Reaching past the prompt of 20 tokens, or beginning there; evictions fall on 24, 28, 32 ... tokens."""
    session = Session(small_lm().engine, ReSTKV(budget=12, window=4, interval=4, protect=(span,)), [20, 3], 40)
    session.prefill([small_ids(20), small_ids(3)])
    for token in small_ids(at - 21):
        session.feed(torch.tensor([token, token]))
    held = at - span[0]
    with pytest.raises(PolicyError, match=f"budget 12 is smaller than the {held} protected .* a text of {at}") as error:
        session.feed(torch.tensor([1, 1]))
    assert "\n" not in str(error.value)


def test_spans_that_the_newest_entries_no_longer_cover_must_fit_too():
    held = ReSTKV(
        budget=12, window=4, interval=4, protect=((12, 20),)
    )  # all of it in the prompt, half of it in the window
    assert small_lm().generate(small_ids(20), held, max_new_tokens=20, ignore_eos=True).finish_reason == "length"
    covered = ReSTKV(budget=12, window=4, interval=4, protect=((11, 20),))  # as the window moves on, one too many
    with pytest.raises(PolicyError, match="the 13 protected entries"):
        small_lm().generate(small_ids(20), covered, max_new_tokens=20, ignore_eos=True)


def test_the_layer_whose_budget_is_too_small_is_named():
    lm, ids = small_lm(windows=(None,) * 3), small_ids(40)
    with pytest.raises(PolicyError, match="layer 2's budget 9 is smaller than the 12 protected entries"):
        lm.generate(ids, ReSTKV(budget=(20, 15, 9), window=4, protect=((0, 8),)), max_new_tokens=1)
    with pytest.raises(PolicyError, match="layer 1's budget 20 is smaller than the 24 protected entries"):
        lm.generate(ids, SnapKV(budget=20, window=4, protect=((0, 20),), budget_by="pyramid"), max_new_tokens=1)


def remarks(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, RestKVWarning)]


def test_remarks_say_what_may_surprise(lm):
    ids, policy = list(range(5, 15)), ReSTKV(budget=20, window=16)
    (short,) = remarks(lambda: lm.generate(ids, policy, max_new_tokens=20))
    assert "window 16 is longer than the prompt of 10 tokens" in short
    assert not remarks(lambda: lm.generate(ids, policy, max_new_tokens=5))  # nothing will be evicted
    (long,) = remarks(lambda: lm.generate(list(range(3, 510)), FullCache(), max_new_tokens=6))
    assert "prompt of 507 tokens plus 6 new ones exceeds the model's 512 positions" in long
    assert not remarks(lambda: lm.generate(list(range(3, 509)), FullCache(), max_new_tokens=6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"backend": "sdpa", "compile": True}, "sdpa"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "tpu9"}, "device 'tpu9'"),
    ],
)
def test_what_cannot_be_loaded_so_is_refused(stories260k, options, words):
    with pytest.raises(PromptError, match=words) as error:
        restkv.load(stories260k, **options)
    assert "\n" not in str(error.value)


def test_compile_and_backend_say_the_same(stories260k):
    assert not restkv.load(stories260k).compiled
    assert restkv.load(stories260k, compile=True).backend == "flex"
    assert restkv.load(stories260k, backend="flex").compiled
    assert math.isclose(restkv.load(stories260k, dtype="bfloat16").config.attn_scale, 8**-0.5)
    assert restkv.load(stories260k, dtype="bfloat16").dtype == torch.bfloat16


# -- compiled

COMPILED = {
    "query sets, one budget for all layers": (
        ReSTKV(budget=20, window=4, interval=8, granularity="query", budget_by="global"),
        {"windows": (9, None)},
    ),
    "every step, accumulated": (H2O(budget=20, recent=4), {}),
    "slots as positions": (StreamingLLM(budget=20), {"thetas": (100.0, 7.0)}),
    "a budget per layer": (SnapKV(budget=(12, 30), window=4, interval=8), {"attn_softcap": 3.0}),
}


@pytest.mark.parametrize(
    "case", [next(iter(COMPILED)), *(pytest.param(c, marks=pytest.mark.slow) for c in list(COMPILED)[1:])]
)
def test_compiled_tokens_are_the_eager_ones(case):
    """Ragged batches of two sizes of prompts, one graph; then the same prompts in chunks, one more for the chunk."""
    torch._dynamo.reset()
    policy, traits = COMPILED[case]
    eager, compiled = (small_lm(backend, group=3, head_dim=16, **traits) for backend in ("sdpa", "flex"))
    for lengths, graphs in (((33, 5), 1), ((50, 49), 0)):
        prompts = [small_ids(length, seed=length) for length in lengths]
        want = eager.generate(prompts, policy, max_new_tokens=40)
        got = compiled.generate(prompts, policy, max_new_tokens=40)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        assert got[0].stats.graphs == graphs
        assert got[0].stats.kept == want[0].stats.kept
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_chunks_are_the_eager_ones():
    torch._dynamo.reset()
    policy = ReSTKV(budget=20, window=4, interval=8)
    eager, compiled = (small_lm(backend, group=3, head_dim=16, windows=(9, None)) for backend in ("sdpa", "flex"))
    how = {"max_new_tokens": 20, "prefill": "chunked", "chunk": 16}
    for lengths, graphs in (((70, 5), 3), ((16, 33), 0)):  # a chunk of one row; a step of all rows
        prompts = [small_ids(length, seed=length) for length in lengths]
        want = eager.generate(prompts, policy, **how)
        got = compiled.generate(prompts, policy, **how)
        assert [row.tokens for row in got] == [row.tokens for row in want]
        assert got[0].stats.graphs <= graphs
    torch._dynamo.reset()

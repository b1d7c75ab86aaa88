"""What an answer says and what it says of itself: text, stop strings, ends, statistics."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import time

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import restkv
from make.small import small_ids, small_lm
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV, SnapKV
from restkv.results import Decoding
from restkv.session import Session

PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def lm(stories260k) -> LM:
    return restkv.load(stories260k, backend="sdpa")


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


@settings(max_examples=40)
@given(tokens=st.lists(st.integers(3, 511), min_size=1, max_size=8))
def test_text_is_what_the_tokens_decode_to_wherever_they_end(lm, tokens):
    """Random tokens: bytes of half characters, spaces at the end."""
    row = lm.answer(Decoding(max_new_tokens=len(tokens), ignore_eos=True))
    pieces = [row.push(token) for token in tokens]
    assert row.reason == "length"
    assert "".join(pieces) == row.text == lm.tokenizer.decode(tokens)


@settings(max_examples=40)
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
    done = lm.generate(PROMPT, FullCache(), max_new_tokens=48, stop=[ending])
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
    """60 MB of keys and values, beyond what earlier tests have left with the allocator."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lm = small_lm(head_dim=128, kv_heads=12, group=1)
    ids = small_ids(2500)
    small = lm.generate(ids[:10], FullCache(), max_new_tokens=1).stats
    large = lm.generate(ids, FullCache(), max_new_tokens=1).stats
    assert large.live_bytes > 60e6
    assert large.peak_bytes - small.peak_bytes > large.live_bytes

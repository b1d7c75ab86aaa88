"""LaCache keeps the ladders of docs/sources.md §2.8, in every layer equally many, whatever the row or the lengths of calls."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from restkv.errors import PolicyError
from restkv.observe import Observation
from restkv.policies import LaCache, get_policy
from twins.reference_policies import Ladders


def call(policy, num_layers, rows, states, budget=None):
    """One eviction in all layers: `rows` holds a list of positions per row and layer; returns what stays, likewise."""
    after: list[list[list[int]]] = [[] for _ in rows]
    for layer in range(num_layers):
        held = [row[layer] for row in rows]
        C = max(map(len, held))
        pos = torch.tensor([positions + [-1] * (C - len(positions)) for positions in held])[:, None].expand(-1, 2, -1)
        newest = torch.tensor([[positions[-1]] for positions in held])
        protected = (pos < policy.sinks) | (pos > newest[:, :, None] - policy.window)
        for start, end in policy.protect:
            protected = protected | ((pos >= start) & (pos < end))
        empty = torch.zeros(len(rows), 2, C, 4)
        obs = Observation(empty[:, :, :1], newest, empty, empty, pos, None, 1.0, layer=layer, num_layers=num_layers)
        obs = replace(
            obs, protected=protected & (pos >= 0), budget_B=torch.tensor([budget or policy.budget] * len(rows))
        )
        keep = policy.keep(obs, states)
        assert torch.equal(keep[:, 0], keep[:, 1])
        for out, positions, stays in zip(after, held, keep[:, 0].tolist(), strict=True):
            out.append([p for p, stay in zip(positions, stays, strict=False) if stay])
    return after


def stream(policy, num_layers, tokens, states=None):
    """Token by token, an eviction after each: positions per layer in the end."""
    states = [policy.start()] if states is None else states
    row: list[list[int]] = [[] for _ in range(num_layers)]
    for t in range(tokens):
        (row,) = call(policy, num_layers, [[[*positions, t] for positions in row]], states)
    return row


def spans(text):
    ranges = (map(int, part.split("-")) for part in text.split(","))
    return [p for first, *last in ranges for p in range(first, (last or [first])[0] + 1)]


@pytest.mark.parametrize(
    ("num_layers", "span", "overlap", "before", "after"),
    [
        (32, 16, 0, 2, 1),
        (32, 8, 4, 7, 2),
        (32, 9, 3, 5, 2),
        (32, 14, 0, 3, 1),
        (24, 9, 7, 9, 5),
        (28, 14, 0, 2, 1),
        (32, None, 0, 2, 1),
        (5, None, 0, 3, 1),
        (2, None, 0, 2, 1),
    ],
)
def test_ladders_of_the_sources(num_layers, span, overlap, before, after):
    assert LaCache(256, span=span, overlap=overlap).ladder(num_layers) == (before, after)


@pytest.mark.parametrize(
    ("cache", "overlap", "tokens", "even", "odd"),
    [
        (16, 0, 40, "0-4,12,20,24,28,30,32,34,36-39", "0-3,11,19,23,27,29,31,33,35,36-39"),
        (
            24,
            1,
            60,
            "0-5,17,23,31,34,39,42,46,47,49,50,52-59",
            "0-3,15,21,29,32,37,40,44,45,47,48,50-59",
        ),
    ],
)
def test_streams_of_the_sources(cache, overlap, tokens, even, odd):
    row = stream(LaCache(cache, span=2, overlap=overlap), 4, tokens)
    assert row == [spans(even), spans(odd)] * 2


def test_single_call_of_the_sources():
    policy = LaCache(24, span=2, overlap=1)
    (row,) = call(policy, 4, [[list(range(60))] * 4], [policy.start()])
    assert row == [
        spans("0-4,10,17,23,30,34,39,43,48-59"),
        spans("0-3,6,12,20,26,31,35,40,44,48-59"),
        spans("0-3,7,13,20,26,32,36,41,45,48-59"),
        spans("0-3,9,15,23,28,33,37,42,46,48-59"),
    ]


def test_equals_the_slow_twin_over_random_calls():
    """Random models and caches, fed in pieces of random length; 200 whole streams without a call the original fails at."""
    source, whole, failing = random.Random(0), 0, 0
    while whole < 200:
        num_layers = source.choice([2, 3, 4, 5, 6, 8, 11, 16])
        span = source.randint(1, num_layers - 1)
        overlap = source.randint(0, span - 1)
        sinks = source.randint(0, 6)
        try:
            least = sinks + num_layers + LaCache(None, span=span, overlap=overlap).ladder(num_layers).after
        except PolicyError:
            continue  # ladders that drop nothing
        cache = source.randint(least, least + 40)
        policy = LaCache(cache, span=span, overlap=overlap, sinks=sinks)
        twin, states = Ladders(num_layers, cache, span, overlap, sinks), [policy.start()]
        assert policy.layer_budgets(100, num_layers) == [cache] * num_layers
        row: list[list[int]] = [[]] * num_layers
        tokens = 0
        for _ in range(source.randint(1, 12)):
            piece = source.choice([1, 1, 1, 2, 7, cache, 4 * cache])
            row = [[*positions, *range(tokens, tokens + piece)] for positions in row]
            tokens += piece
            before, kept = row, twin(len(row[0]))
            (row,) = call(policy, num_layers, [row], states)
            assert len({len(positions) for positions in row}) == 1
            assert len(row[0]) <= twin.c and row[0][:sinks] == list(range(min(sinks, tokens)))
            if twin.strange:
                assert all(positions[-1] == tokens - 1 for positions in row)
                failing += 1
                break
            assert row == [[line[s] for s in slots] for line, slots in zip(before, kept, strict=True)]
        whole += not twin.strange
    assert failing > 10


def test_rows_of_a_batch_go_their_own_ways():
    policy, starts = LaCache(20, span=3, overlap=1), [40, 7, 19]
    rows, states = [[list(range(n))] * 6 for n in starts], [policy.start() for _ in starts]
    alone, own = copy.deepcopy(rows), [policy.start() for _ in starts]
    for step in range(30):
        rows = call(policy, 6, rows, states)
        for i in range(3):
            (alone[i],) = call(policy, 6, [alone[i]], own[i : i + 1])
        assert rows == alone
        for side in (rows, alone):
            for n, row in zip(starts, side, strict=True):
                row[:] = [[*positions, n + step] for positions in row]


def test_a_fork_goes_on_alone_and_the_policy_keeps_nothing():
    policy = LaCache(16, span=2)
    states = [policy.start()]
    first = stream(policy, 4, 30, states)
    fork = copy.deepcopy(states)
    (one,) = call(policy, 4, [[[*positions, 30] for positions in first]], states)
    (two,) = call(policy, 4, [[[*positions, 30] for positions in first]], fork)
    assert one == two and stream(policy, 4, 30) == first
    assert policy == LaCache(16, span=2)


def test_protected_entries_stand_outside_the_ladders():
    """The ladders of the rest are those of a smaller cache without sinks, shifted."""
    outside = LaCache(16 + 5 + 3, span=2, protect=((10, 15),), window=3)
    row = stream(outside, 4, 60)
    inside = stream(LaCache(16, span=2), 4, 60 - 5 - 3)
    moved = [[p if p < 10 else p + 5 for p in positions] for positions in inside]
    assert row == [sorted({*positions, *range(10, 15), 57, 58, 59}) for positions in moved]


def test_a_cache_too_small_for_ladders_or_a_span_of_all_layers_is_refused_by_name():
    with pytest.raises(PolicyError, match=r"lacache: span 16: the model has 5 layers"):
        LaCache(64, span=16).layer_budgets(100, 5)
    with pytest.raises(PolicyError, match=r"lacache: span None: the model has 1 layers"):
        LaCache(64).layer_budgets(100, 1)
    with pytest.raises(PolicyError, match=r"lacache: overlap 2: half of the model's layers are 2"):
        LaCache(64, overlap=2).layer_budgets(100, 5)
    with pytest.raises(
        PolicyError, match=r"lacache: overlap 9: in a model of 12 layers, ladders of span 10 then drop nothing"
    ):
        LaCache(64, span=10, overlap=9).layer_budgets(100, 12)
    with pytest.raises(PolicyError, match=r"lacache: budget 9: ladders need 10"):
        LaCache(9).layer_budgets(100, 5)
    with pytest.raises(PolicyError, match=r"lacache: budget 19: ladders need 20: 14 protected"):
        LaCache(19, protect=((2, 8),), window=6).layer_budgets(100, 5)
    assert LaCache(10).layer_budgets(100, 5) == LaCache(0.01).layer_budgets(100, 5) == [10] * 5
    assert LaCache(0.5).layer_budgets(100, 5) == [50] * 5


@pytest.mark.parametrize(
    "values",
    [{"span": 0}, {"span": 1.5}, {"overlap": -1}, {"span": 2, "overlap": 2}, {"granularity": "query"}, {"gqa": "max"}],
)
def test_bad_options(values):
    with pytest.raises(PolicyError, match=f"lacache: {list(values)[-1]}"):
        LaCache(64, **values)
    with pytest.raises(PolicyError, match="lacache: budget_by"):
        LaCache(64, budget_by="pyramid", positions="original")


def test_presets():
    assert get_policy("lacache", preset="ppl") == LaCache(256, span=16)
    assert get_policy("lacache", preset="niah", budget=0.25) == LaCache(0.25, sinks=64)

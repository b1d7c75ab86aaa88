"""Sampling: every filter against a loop over sorted probabilities, and draws against the probabilities themselves."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from restkv.errors import PromptError
from restkv.sampling import COLDEST, Sampling, filter_logits, sample

logits_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.2, 0.001]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 0.99]),
)


def allowed(logits: list[float], s: Sampling) -> tuple[set[int], set[int]]:
    """Ids that may be drawn, and ids about which rounding decides: one filter after the other, one token at a time."""
    left = dict(enumerate(logits))
    doubtful: set[int] = set()
    if s.top_k:
        kth = sorted(left.values(), reverse=True)[: s.top_k][-1]
        left = {i: x for i, x in left.items() if x >= kth}  # whoever ties with the k-th stays
    weight = {i: math.exp(x / s.temperature) for i, x in left.items()}
    total, before = sum(weight.values()), 0.0
    for i in sorted(left, key=lambda i: (-left[i], i)):
        if s.top_p < 1 and before / total >= s.top_p:
            del left[i]
        if abs(before / total - s.top_p) < 1e-5:
            doubtful.add(i)
        before += weight[i]
    largest = max(left.values())
    for i, x in list(left.items()):
        ratio = math.exp((x - largest) / s.temperature)
        if ratio < s.min_p:
            del left[i]
        if abs(ratio - s.min_p) < 1e-5:
            doubtful.add(i)
    return set(left), doubtful


@settings(max_examples=many(400, 2))
@given(rows=st.lists(logits_lists, min_size=1, max_size=3), sampling=samplings)
def test_filters_are_the_loop(rows, sampling):
    vocab = min(map(len, rows))
    rows = [row[:vocab] for row in rows]
    got_BV = filter_logits(torch.tensor(rows), sampling)
    for logits, got_V in zip(rows, got_BV.tolist(), strict=True):
        stays, doubtful = allowed(logits, sampling)
        assert stays
        for i, x in enumerate(got_V):
            if i not in doubtful:
                assert (x > -math.inf) == (i in stays)
            if x > -math.inf:
                assert x == pytest.approx(logits[i] / sampling.temperature, rel=1e-6, abs=1e-6)


def test_the_likeliest_token_is_never_filtered_out():
    logits_BV = torch.tensor([[2.0, 1.0, 2.0]])
    for sampling in (Sampling(1, top_p=1e-9), Sampling(1, top_k=1), Sampling(1, min_p=0.999), Sampling(1e-3)):
        assert filter_logits(logits_BV, sampling)[0, 0] > -math.inf
    assert torch.equal(
        filter_logits(logits_BV, Sampling(1, top_p=0.01)) > -math.inf, torch.tensor([[True, False, False]])
    )


def test_filters_apply_in_their_order():
    """Of [.5, .3, .2], top_k = 2 leaves [.625, .375]: top_p = .6 then takes one token, where .6 of all would take two."""
    logits_BV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (filter_logits(logits_BV, Sampling(1, top_k=2, top_p=0.6)) > -math.inf).tolist() == [[True, False, False]]
    assert (filter_logits(logits_BV, Sampling(1, top_p=0.6)) > -math.inf).tolist() == [[True, True, False]]
    assert (filter_logits(logits_BV, Sampling(0.1, min_p=0.5)) > -math.inf).tolist() == [[True, False, False]]
    assert (filter_logits(logits_BV, Sampling(1, min_p=0.5)) > -math.inf).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=3), Sampling(2.0, top_k=3, seed=4), Sampling(0.7, top_p=0.8, seed=5)]
)
def test_draws_follow_the_probabilities(sampling):
    logits_BV, draws = torch.tensor([[1.0, 0.2, -0.5, 2.0, -3.0]]), 4000
    probs_V = filter_logits(logits_BV, sampling).softmax(-1)[0]
    generators = sampling.generators(1)
    counts_V = torch.zeros(5)
    for _ in range(draws):
        counts_V[sample(logits_BV, sampling, generators)] += 1
    sigma_V = (draws * probs_V * (1 - probs_V)).sqrt()
    assert ((counts_V - draws * probs_V).abs() <= 4 * sigma_V).all()
    assert not counts_V[probs_V == 0].any()


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, 1.0]])
    assert sample(logits_BV, Sampling(), []).tolist() == [1, 0]


@pytest.mark.parametrize("top_p", [1e-300, 5e-324, 1e-46, 1e-39, math.ulp(0.0), Fraction(1, 10**300)])
def test_the_smallest_top_p_takes_the_likeliest(top_p):
    """In float32 all of these are 0, or no normal number."""
    logits_BV = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 4
    for temperature in (COLDEST, 0.3, 1.0, 50.0):
        sampling = Sampling(temperature, top_p=top_p, seed=1)
        assert torch.equal(sample(logits_BV, sampling, sampling.generators(5)), logits_BV.argmax(-1))


extremes = st.builds(
    Sampling,
    temperature=st.sampled_from([COLDEST, 1e-5, 1e-3, 1.0, 1e6, 1e39, 1e300, math.inf]),
    top_k=st.sampled_from([0, 1, 3, 10**30]),
    top_p=st.sampled_from([1.0, 1 - 1e-12, 0.999999999, 0.5, 1e-9, 1e-45, 1e-300]),
    min_p=st.sampled_from([0.0, 1e-300, 1e-45, 1e-9, 0.5, 1 - 1e-12]),
    seed=st.integers(0, 2**64 - 1),
)
far = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, -1e30, 3e38, -3e38, 88.0, 1e4, -1e4, -math.inf])


@settings(max_examples=many(300, 2))
@given(logits=st.lists(far, min_size=2, max_size=6).filter(lambda row: max(row) > -math.inf), sampling=extremes)
def test_whatever_the_numbers_what_is_drawn_is_possible(logits, sampling):
    """Never an entry of -inf, nor one that a filter leaves out, however far apart the logits and how extreme the options."""
    logits_1V = torch.tensor([logits])
    (token,) = sample(logits_1V, sampling, sampling.generators(1)).tolist()
    assert logits[token] > -math.inf
    if sampling.temperature <= 1 and (sampling.top_k == 1 or sampling.top_p <= 1e-9):  # hotter ones make ties
        assert logits[token] == max(logits)
    if sampling.temperature == COLDEST:
        assert logits[token] >= max(logits) - max(1e-3, abs(max(logits)) * 1e-6)


def test_a_large_vocabulary_loses_no_tail():
    """Masses add up to p over 200,000 tokens: a sum in float32 would be off by more than the tail has."""
    logits_1V = torch.zeros(1, 200_000)
    kept = (filter_logits(logits_1V, Sampling(1.0, top_p=0.9999)) > -math.inf).sum()
    assert abs(int(kept) - 199_980) <= 1


def test_rows_draw_from_generators_of_their_own():
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    generators = Sampling(1.0, seed=7).generators(3)
    together = torch.stack([sample(logits_BV, Sampling(1.0), generators) for _ in range(20)])
    for row in range(3):
        alone = Sampling(1.0, seed=7 + row).generators(1)
        mine = torch.cat([sample(logits_BV[row : row + 1], Sampling(1.0), alone) for _ in range(20)])
        assert torch.equal(together[:, row], mine)


def test_without_a_seed_every_call_draws_anew():
    logits_BV = torch.zeros(1, 1000)

    def draws():
        generators = Sampling(1.0).generators(1)
        return [int(sample(logits_BV, Sampling(1.0), generators)) for _ in range(8)]

    assert draws() != draws()


def test_the_largest_seed_and_the_coldest_temperature_do_draw():
    logits_BV = torch.tensor([[5.0, 900.0, -3.0]]).expand(2, 3)
    sampling = Sampling(COLDEST, seed=(1 << 64) - 1)  # the second row's seed begins again at 0
    assert sample(logits_BV, sampling, sampling.generators(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", Fraction(1, 10**400)),
        ("top_p", Fraction(1, 10**400)),
        ("top_p", 10**400),
        ("top_p", math.nan),
        ("min_p", math.nan),
        ("temperature", 1e-39),
        ("top_k", -1),
        ("top_k", 2.5),
        ("seed", -1),
        ("seed", 0.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.0),
        ("temperature", None),
        ("temperature", "a"),
        ("top_p", "x"),
        ("min_p", None),
        ("min_p", [0.5]),
    ],
)
def test_impossible_values_are_named(option, value):
    with pytest.raises(PromptError, match=re.escape(f"{option}={value!r}")) as error:
        Sampling(**{option: value})
    assert "\n" not in str(error.value)

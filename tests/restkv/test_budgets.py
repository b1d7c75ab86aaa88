"""Budgets of layers and heads: equal to slow twins, exact totals, rows on their own, a cascade equal to one selection."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from make.effort import many
from restkv.budgets import ALLOCATIONS, Allocation, Global, HeadAdaptive, Pyramid
from restkv.errors import PolicyError
from restkv.observe import Observation
from restkv.policies import KeyNorm, SnapKV
from twins import reference_budgets as reference

FLOORS = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 1)
# Multiples of 1/8, few of them: ties are the rule, and sums are exact in any order.
VALUES = torch.tensor([0.0, -0.0, 0.125, 0.5, 1.0, 3.0, math.inf, -math.inf, math.nan])
MILD = torch.tensor([0.0, 0.125, 0.25, 0.5, 0.625, 1.0, 3.0, -math.inf, math.nan])


@st.composite
def layers_of(draw, rows, heads, values=VALUES, continuous=True):
    """Score, pos and protected [rows, heads, columns]: padding anywhere, columns in any order, heads of any length."""
    columns = draw(st.integers(0, 14))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (rows, heads, columns)
    score = values[torch.randint(len(values), shape, generator=random)]
    if continuous and draw(st.booleans()):
        score = torch.rand(shape, generator=random)
    pos = torch.rand(shape, generator=random).argsort(-1) * 2
    pos = pos.masked_fill(torch.rand(shape, generator=random) < draw(st.sampled_from([0, 0.3, 0.8])), -1)
    newest = draw(st.integers(0, 2 * columns + 1))
    return score, pos, (pos >= newest) | (torch.rand(shape, generator=random) < draw(st.sampled_from([0, 0.2])))


def per_row(tensors, row):
    return [tensor[row].tolist() for tensor in tensors]


def columns_of(keep_XC):
    return set(map(tuple, keep_XC.nonzero().tolist()))


# ---- pyramid

shapes = {
    "window": st.integers(0, 40),
    "extra": st.integers(0, 300),
    "num_layers": st.integers(1, 40),
    "length": st.integers(1, 2000),
    "beta": st.integers(1, 40),
    "middle_regime": st.booleans(),
}


@settings(max_examples=many(250, 2))
@given(**shapes)
def test_pyramid_released_integers(window, extra, num_layers, length, beta, middle_regime):
    assume(window + extra > 0)
    args = (window + extra, window, num_layers, length)
    got = Pyramid(beta=beta, middle_regime=middle_regime).layers(*args)
    assert got == reference.pyramid(*args, beta=beta, middle_regime=middle_regime)


@settings(max_examples=many(250, 2))
@given(**shapes)
def test_pyramid_exact_spends_everything_along_the_same_line(window, extra, num_layers, length, beta, middle_regime):
    assume(window + extra > 0)
    args = (window + extra, window, num_layers, length)
    got = Pyramid(beta=beta, exact=True, middle_regime=middle_regime).layers(*args)
    released = reference.pyramid(*args, beta=beta, middle_regime=middle_regime)
    assert sum(got) == num_layers * (window + extra)
    assert got == sorted(got, reverse=True)
    assert min(got) >= window + extra // beta or length < window + extra or released[0] == length
    assert got[0] == released[0]
    if len(set(released)) > 1:
        line = reference.pyramid_line(*args, beta=beta)
        assert all(abs(count - exact) < 1 for count, exact in zip(got, line, strict=True))


@pytest.mark.parametrize(
    ("budget", "length", "first", "last", "mean"),
    [
        (64, 10**6, 63, 1, 32),
        (128, 10**6, 188, 33, 110.5),
        (512, 10**6, 936, 37, 486.5),
        (1024, 10**6, 1935, 75, 1005),
        (1024, 1500, 1468, 538, 1003),
    ],
)
def test_pyramid_vectors_of_the_spec(budget, length, first, last, mean):
    past = [count - 32 for count in Pyramid(middle_regime=False).layers(budget, 32, 32, length)]
    assert (past[0], past[-1], sum(past) / 32) == (first, last, mean)


def test_pyramid_regimes():
    assert Pyramid().layers(96, 32, 4, 127) == [96] * 4
    assert Pyramid().layers(96, 32, 4, 128) == [128, 107, 86, 65]
    assert Pyramid().layers(96, 32, 4, 400) == [157, 117, 77, 37]
    assert Pyramid(exact=True).layers(96, 32, 4, 400) == [157, 117, 75, 35]
    assert Pyramid(middle_regime=False).layers(96, 32, 4, 127) == [127, 107, 87, 67]
    assert Pyramid(middle_regime=False).layers(96, 32, 4, 95) == [96] * 4


@pytest.mark.parametrize("exact", [False, True])
def test_pyramid_leaves_no_layer_without_entries(exact):
    for budget in range(1, 42):
        for num_layers in (2, 3, 32):
            budgets = KeyNorm(budget, window=0, budget_by=Pyramid(exact=exact)).layer_budgets(1000, num_layers)
            assert min(budgets) >= 1
            assert not exact or sum(budgets) == num_layers * budget
    assert KeyNorm(19, window=0, budget_by=Pyramid(exact=exact)).layer_budgets(1000, 3) == [37, 19, 1]


@pytest.mark.parametrize("layer", [0, 3])
def test_pyramid_released_code(layer, shared):
    with safe_open(shared / "golden" / f"pyramid_l{layer}.safetensors", "pt") as file:
        params = json.loads(file.metadata()["params"])
        q, k, v, idx = (file.get_tensor(name) for name in ("q", "k", "v", "idx"))
    W, L, num_layers = params["window"], k.shape[2], params["num_hidden_layers"]
    policy = SnapKV(
        budget=params["budget"],
        window=W,
        kernel_size=params["kernel_size"],
        granularity="query",
        budget_by=Pyramid(beta=params["beta"]),
    )
    pos = torch.arange(L).expand(1, k.shape[1], L)
    budget_B = torch.tensor([policy.layer_budgets(L, num_layers)[layer]])
    obs = Observation(
        q[:, :, -W:],
        torch.arange(L - W, L)[None],
        k,
        v,
        pos,
        None,
        k.shape[3] ** -0.5,
        protected=pos >= L - W,
        budget_B=budget_B,
    )
    want = torch.zeros(1, q.shape[1], L, dtype=torch.bool).scatter(-1, idx.long(), True)
    want[..., L - W :] = True
    assert torch.equal(policy.keep(obs), want)


# ---- adakv


@settings(max_examples=many(250, 2))
@given(data=st.data(), rows=st.integers(1, 3), heads=st.integers(1, 4), normalize=st.booleans(), exact=st.booleans())
def test_adakv_equals_its_loops(data, rows, heads, normalize, exact):
    # Infinite scores have no share of a sum, and sums of random floats depend on their order.
    score, pos, protected = tensors = data.draw(layers_of(rows, heads, *((MILD, False) if normalize else ())))
    floor = data.draw(st.sampled_from(FLOORS))
    budget = torch.tensor(data.draw(st.lists(st.integers(0, 16), min_size=rows, max_size=rows)))
    keep = HeadAdaptive(floor=floor, normalize=normalize, exact=exact).select(score, pos, protected, budget)
    for row in range(rows):
        score, pos, protected = per_row(tensors, row)
        want = reference.adakv(score, pos, protected, int(budget[row]), floor, normalize, exact)
        assert columns_of(keep[row]) == want
        if exact:
            entries = sum(p >= 0 for line in pos for p in line)
            held = int((tensors[2][row] & (tensors[1][row] >= 0)).sum())
            assert len(want) == min(entries, max(held, heads * int(budget[row])))


def test_adakv_gives_the_heads_what_their_scores_deserve():
    score = torch.tensor([[[9.0, 8, 7, 6, 5, 0, 0], [4, 3, 2, 1, 0, 0, 0]]])
    pos = torch.arange(7).expand(1, 2, 7)
    protected = pos >= 6
    counts = {
        floor: HeadAdaptive(floor=floor).select(score, pos, protected, torch.tensor([4])).sum(-1)
        for floor in (0, 0.5, 1)
    }
    # base 3: the six best unprotected entries are 9 8 7 6 5 and 4
    assert {floor: count.tolist() for floor, count in counts.items()} == {0: [[6, 2]], 0.5: [[5, 3]], 1: [[4, 4]]}


def test_adakv_normalised_scores_favour_the_concentrated_head():
    score = torch.tensor([[[4.0, 4, 4, 4], [3, 0, 0, 0]]])
    pos, free = torch.arange(4).expand(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.bool)
    budget = torch.tensor([1])
    assert HeadAdaptive(floor=0).select(score, pos, free, budget).sum(-1).tolist() == [[2, 0]]
    # Head 0 has a quarter of its sum in its best entry, head 1 all of it: 4 * 1/4 < 3 * 1.
    assert HeadAdaptive(floor=0, normalize=True).select(score, pos, free, budget).sum(-1).tolist() == [[1, 1]]


def test_adakv_a_head_of_zeros_weighs_nothing_but_is_no_error():
    score = torch.tensor([[[0.0, 0], [1, 0]]])
    pos, free = torch.arange(2).expand(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)
    keep = HeadAdaptive(floor=0, normalize=True).select(score, pos, free, torch.tensor([1]))
    assert keep.tolist() == [[[False, True], [True, False]]]


def test_adakv_what_one_head_cannot_use_goes_to_the_best_of_the_others():
    score = torch.tensor([[[1.0, 1, 1, 1, 1, 1], [9, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf]]])
    pos, free = torch.arange(6).expand(1, 2, 6), torch.zeros(1, 2, 6, dtype=torch.bool)
    keep = HeadAdaptive(floor=1).select(score, pos, free, torch.tensor([3]))
    assert keep.sum(-1).tolist() == [[5, 1]], "a hidden entry outlived a visible one"


@pytest.mark.parametrize(
    "allocation", [HeadAdaptive(), HeadAdaptive(normalize=True, exact=False), Global()], ids=lambda a: a.name
)
def test_equal_scores_leave_the_newest_then_the_first_heads(allocation):
    pos, free = torch.arange(5).expand(1, 3, 5), torch.zeros(1, 3, 5, dtype=torch.bool)
    keep = allocation.select(torch.ones(1, 3, 5), pos, free, torch.tensor([2]))
    assert keep.sum(-1).tolist() == [[2, 2, 2]]
    one = Global(floor=0).select_layers([torch.ones(1, 3, 5)] * 2, [pos] * 2, [free] * 2, torch.tensor([1]))
    assert [layer.sum(-1).tolist() for layer in one] == [[[1, 1, 1]], [[1, 1, 1]]]
    both = Global(floor=0).select_layers(
        [torch.ones(1, 2, 5)] * 2, [pos[:, :2]] * 2, [free[:, :2]] * 2, torch.tensor([1])
    )
    assert all(layer[..., -1].all() and not layer[..., :-1].any() for layer in both)


# ---- global


@st.composite
def models(draw):
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.lists(layers_of(rows, heads), min_size=1, max_size=4))
    budget = torch.tensor(draw(st.lists(st.integers(0, 16), min_size=rows, max_size=rows)))
    return layers, budget, draw(st.sampled_from(FLOORS))


@settings(max_examples=many(250, 2))
@given(models())
def test_global_equals_its_loops(model):
    layers, budget, floor = model
    scores, positions, safes = zip(*layers, strict=True)
    keeps = Global(floor=floor).select_layers(scores, positions, safes, budget)
    for row, limit in enumerate(budget.tolist()):
        kept = {(n, *entry) for n, keep in enumerate(keeps) for entry in columns_of(keep[row])}
        assert kept == reference.whole_model([per_row(layer, row) for layer in layers], limit, floor)
        heads = [(pos[row] >= 0, protected[row]) for _, pos, protected in layers]
        if all(((exists & safe).sum(-1) <= limit).all() for exists, safe in heads):
            entries, total = (
                sum(int(exists.sum()) for exists, _ in heads),
                limit * sum(len(exists) for exists, _ in heads),
            )
            assert len(kept) == min(entries, total)


@settings(max_examples=many(250, 2))
@given(models())
def test_cascade_is_the_one_selection(model):
    layers, budget, floor = model
    allocation = Global(floor=floor)
    scores, positions, safes = zip(*layers, strict=True)
    at_once = allocation.select_layers(scores, positions, safes, budget)
    for row, limit in enumerate(budget.tolist()):
        cascade = allocation.cascade(len(layers), limit)
        alive: list[torch.Tensor] = []  # (head, column) of each layer's survivors
        kept = sum(int(keep[row].sum()) for keep in at_once)
        for layer in layers:
            score, pos, protected = (tensor[row] for tensor in layer)
            *earlier, new = cascade.add(score, pos, protected)
            alive = [entries[keep] for entries, keep in zip(alive, earlier, strict=True)] + [new.nonzero()]
            assert cascade.sizes == [len(entries) for entries in alive]
            assert sum(cascade.sizes) <= kept
        for entries, keep in zip(alive, at_once, strict=True):
            assert torch.equal(entries, keep[row].nonzero())


def test_global_spends_where_the_scores_are_but_leaves_every_head_its_floor():
    quiet, loud = torch.arange(10.0).expand(1, 2, 10), torch.arange(10.0).expand(1, 2, 10) + 100
    pos = torch.arange(10).expand(1, 2, 10)
    protected = pos < 1
    for floor, kept in ((0, [[1, 1], [9, 9]]), (0.5, [[3, 3], [7, 7]]), (1, [[5, 5], [5, 5]])):
        layers = Global(floor=floor).select_layers([quiet, loud], [pos] * 2, [protected] * 2, torch.tensor([5]))
        assert [layer[0].sum(-1).tolist() for layer in layers] == kept


def test_a_floor_that_is_a_whole_number_loses_nothing_to_floating_point():
    assert 0.29 * 100 < 29
    pos = torch.arange(50).expand(1, 1, 50)
    sure = Global(floor=0.29).sure(torch.rand(1, 1, 50), pos, pos < 0, torch.tensor([100]))
    assert sure.sum() == 29
    # The best 18 are 12 of the first head and 6 of the second, whose capacity is thus 6 * (1 - 0.3) + 6 * 0.3 = 6.
    assert 6 * (1 - 0.3) + 18 * (0.3 / 3) < 6
    pos = torch.arange(12).expand(1, 3, 12)
    score = pos + torch.tensor([200.0, 100, 0])[:, None]
    assert HeadAdaptive(floor=0.3).select(score, pos, pos < 0, torch.tensor([6])).sum(-1).tolist() == [[11, 6, 1]]


def test_shares_of_budgets_too_large_for_float32():
    assert torch.tensor(10_001) * 0.9999 >= 10_000, "a whole number times a share is float32 unless asked otherwise"
    pos = torch.arange(10_001).expand(1, 1, -1)
    assert Global(floor=0.9999).sure(pos.float(), pos, pos < 0, torch.tensor([10_001])).sum() == 9999


def test_global_keeps_nothing_hidden_in_preference_to_something_visible():
    hidden, visible = torch.full((1, 1, 6), -math.inf), torch.zeros(1, 1, 6)
    hidden[..., -1] = 5
    pos, free = torch.arange(6).expand(1, 1, 6), torch.zeros(1, 1, 6, dtype=torch.bool)
    sliding, full = Global(floor=1).select_layers([hidden, visible], [pos] * 2, [free] * 2, torch.tensor([3]))
    assert (sliding.sum(), full.sum()) == (1, 5) and sliding[..., -1].all()


# ---- all of them


@settings(max_examples=many(200, 2))
@given(data=st.data(), rows=st.integers(2, 3), heads=st.integers(1, 3))
def test_a_row_of_a_batch_is_a_row_alone_and_other_padding_changes_nothing(data, rows, heads):
    score, pos, protected = data.draw(layers_of(rows, heads))
    budget = torch.tensor(data.draw(st.lists(st.integers(0, 16), min_size=rows, max_size=rows)))
    padded = ((score, 7.0), (pos, -1), (protected, True))
    wide_score, wide_pos, wide_protected = (torch.nn.functional.pad(t, (3, 2), value=fill) for t, fill in padded)
    for cls in ALLOCATIONS.values():
        keep = cls().select(score, pos, protected, budget)
        assert torch.equal(
            cls().select(wide_score, wide_pos, wide_protected, budget)[..., 3 : 3 + keep.shape[-1]], keep
        )
        for row in range(rows):
            one = slice(row, row + 1)
            assert torch.equal(cls().select(score[one], pos[one], protected[one], budget[one]), keep[one])


@pytest.mark.parametrize("name", ["adakv", "global"])
def test_scores_in_any_float_and_positions_in_any_int(name):
    random = torch.Generator().manual_seed(0)
    score = torch.randint(0, 9, (2, 3, 40), generator=random)
    pos, free = torch.arange(40).expand(2, 3, 40), torch.zeros(2, 3, 40, dtype=torch.bool)
    allocation, budget = ALLOCATIONS[name](), torch.tensor([10, 7])
    want = allocation.select(score.double(), pos, free, budget)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(allocation.select(score.to(dtype), pos.int(), free, budget.int()), want)


def test_an_allocation_can_be_a_name_or_an_object_of_any_policy():
    assert list(ALLOCATIONS) == ["uniform", "pyramid", "adakv", "global"]
    assert SnapKV(budget=64, budget_by="adakv").allocation == HeadAdaptive()
    assert SnapKV(budget=64, budget_by=Pyramid(exact=True)).layer_budgets(400, 3) == [95, 64, 33]
    assert {cls.name: (cls.ragged, cls.across_layers) for cls in ALLOCATIONS.values()} == {
        "uniform": (False, False),
        "pyramid": (False, False),
        "adakv": (True, False),
        "global": (True, True),
    }
    assert [cls().layers(64, 32, 2, 40) for cls in (Allocation, HeadAdaptive, Global)] == [[64, 64]] * 3


def given_anyhow(**options: Any) -> dict[str, Any]:
    """Options of types that a type checker would refuse."""
    return options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pyramid(beta=0), "budget_by pyramid: beta 0: give a whole number of at least 1"),
        (partial(Pyramid, **given_anyhow(beta=2.5)), "budget_by pyramid: beta 2.5: give a whole number"),
        (lambda: Pyramid(beta=True), "budget_by pyramid: beta True: give a whole number"),
        (partial(Pyramid, **given_anyhow(exact="yes")), "budget_by pyramid: exact 'yes': give True or False"),
        (lambda: HeadAdaptive(floor=1.5), "budget_by adakv: floor 1.5: give the share .* in \\[0, 1\\]"),
        (lambda: HeadAdaptive(floor=math.nan), "budget_by adakv: floor nan: give the share"),
        (partial(HeadAdaptive, **given_anyhow(normalize=1)), "budget_by adakv: normalize 1: give True or False"),
        (lambda: Global(floor=-0.1), "budget_by global: floor -0.1: give the share"),
        (partial(Global, **given_anyhow(floor="8")), "budget_by global: floor '8': give the share"),
    ],
)
def test_refused_in_one_line(make, message):
    with pytest.raises(PolicyError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

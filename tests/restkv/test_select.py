"""Selection: exact counts, protected entries, ties, NaN; equal to a sort written the slow way."""

from __future__ import annotations

import math
import multiprocessing
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from restkv.select import largest, nth_largest, select
from twins import reference

# Few distinct values, so that ties are the rule.
values = st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, math.inf, -math.inf, math.nan, 1e-30, 2e-30])


@settings(max_examples=many(300, 2))
@given(data=st.data(), rows=st.integers(1, 3), heads=st.integers(1, 3), columns=st.integers(1, 12))
def test_equals_a_sort(data, rows, heads, columns):
    shape = (rows, heads, columns)

    def draw(element):
        count = rows * heads * columns
        return torch.tensor(data.draw(st.lists(element, min_size=count, max_size=count))).view(shape)

    score, protected, empty = draw(values), draw(st.booleans()), draw(st.booleans())
    pos = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).argsort(-1)
    pos = (pos * 3).masked_fill(empty, -1)
    each = data.draw(st.lists(st.integers(0, columns + 2), min_size=rows * heads, max_size=rows * heads))
    budget = torch.tensor(each).view(rows, heads)
    budget = data.draw(st.sampled_from([budget, budget[:, 0], int(budget[0, 0])]))
    keep = select(score, pos, protected, budget)
    for b in range(rows):
        for x in range(heads):
            limit = budget if isinstance(budget, int) else int(budget[b] if budget.ndim == 1 else budget[b, x])
            scores, positions, safe = (t[b, x].tolist() for t in (score, pos, protected))
            kept = set(keep[b, x].nonzero().flatten().tolist())
            assert kept == reference.select(scores, positions, safe, limit)
            held = sum(p >= 0 and bool(stays) for p, stays in zip(positions, safe, strict=True))
            assert len(kept) == min(max(limit, held), sum(p >= 0 for p in positions))


@settings(max_examples=many(200, 2))
@given(
    data=st.data(), shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 30)), distinct=st.booleans()
)
def test_the_largest_are_those_of_a_sort(data, shape, distinct):
    size, (*lines, columns) = math.prod(shape), shape
    floats = st.floats(-1e6, 1e6, width=32) if distinct else values
    x = torch.tensor(data.draw(st.lists(floats, min_size=size, max_size=size, unique=distinct))).view(shape)
    count = data.draw(st.integers(1, columns))
    found = largest(x, count)
    assert found.shape == (*lines, count) and found.dtype == torch.long
    assert all(len(set(line)) == count for line in found.view(-1, count).tolist())  # no column twice
    want = x.sort(-1, descending=True).values[..., :count]  # NaN is the largest
    got = x.gather(-1, found).sort(-1, descending=True).values
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(nth_largest(x, count), want[..., -1:], rtol=0, atol=0, equal_nan=True)


def test_a_dtype_that_numpy_lacks_gives_the_same():
    score = torch.randint(-9, 9, (2, 3, 40)).float()
    pos, protected = torch.arange(40).expand(2, 3, 40), torch.zeros(2, 3, 40, dtype=torch.bool)
    assert torch.equal(select(score.bfloat16(), pos, protected, 7), select(score, pos, protected, 7))
    assert torch.equal(nth_largest(score.bfloat16(), 7).float(), nth_largest(score, 7))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_was_forked_finds_them_too():
    x = torch.rand(8, 50, generator=torch.Generator().manual_seed(0))
    want = largest(x, 5)  # leaves threads behind that a child does not have
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply_async(largest, (x, 5)).get(timeout=60), want)


def test_the_older_of_equal_scores_loses():
    pos = torch.tensor([[[7, 3, 9, 5, -1, 1]]])
    kept = select(torch.zeros(1, 1, 6), pos, torch.zeros(1, 1, 6, dtype=torch.bool), 3)
    assert pos[kept].tolist() == [7, 9, 5]


def test_protected_entries_outlive_better_scores_and_outnumber_a_budget():
    pos = torch.arange(5).view(1, 1, 5)
    protected = torch.tensor([[[True, True, True, False, False]]])
    score = torch.tensor([[[-math.inf, math.nan, 0.0, math.inf, 9.0]]])
    assert select(score, pos, protected, 2).tolist() == [[[True, True, True, False, False]]]
    assert select(score, pos, protected, 4).tolist() == [[[True, True, True, True, False]]]


def test_nan_goes_with_the_worst():
    pos = torch.arange(4).view(1, 1, 4)
    score = torch.tensor([[[-5.0, math.nan, -math.inf, 0.0]]])
    keep = [select(score, pos, torch.zeros_like(pos, dtype=torch.bool), n)[0, 0].tolist() for n in (2, 3)]
    assert keep == [[True, False, False, True], [True, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_order_of_columns_does_not_matter(dtype):
    random = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (2, 3, 50), generator=random).float()
    pos = torch.arange(50, dtype=dtype).expand(2, 3, 50)
    protected = torch.rand(2, 3, 50, generator=random) < 0.1
    order = torch.randperm(50, generator=random)
    shuffled = select(score[..., order], pos[..., order], protected[..., order], 20)
    assert torch.equal(shuffled, select(score, pos, protected, 20)[..., order])


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_a_graph_is_told(count, dtype):
    """Shapes, strides and offsets; of a dtype that numpy lacks, too, which is a GPU's way."""
    score = torch.randn(2, 3, 40).to(dtype)
    pos, among = torch.arange(40).expand(2, 3, 40).contiguous(), torch.ones(2, 3, 40, dtype=torch.bool)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.restkv.nth_largest.default, (score, count)),
        (torch.ops.restkv.largest.default, (score, count)),
        (torch.ops.restkv.top.default, (score, pos, among, torch.full((2, 3), count), count)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

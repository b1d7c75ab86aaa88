"""Observations: who sees what, and the roots that stand in for W_O."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from restkv.observe import attention_BHWC, group_root_of, root_of, weighted_attention
from restkv.testing.cases import shapes
from restkv.testing.observed import observation
from twins import reference


@settings(max_examples=many(100, 2))
@given(shape=shapes, per_head=st.booleans())
def test_attention_equals_the_slow_twin(shape, per_head):
    obs, _ = observation(**shape, per_head=per_head)
    attention = attention_BHWC(obs)
    assert attention.dtype == torch.float64
    for b in range(obs.q.shape[0]):
        for h in range(obs.q.shape[1]):
            head = reference.Head(obs, b, h)
            want = np.zeros(attention.shape[2:])
            first = len(want) - len(head.attention)
            for w, row in enumerate(head.attention):
                want[first + w, head.columns] = row
            np.testing.assert_allclose(attention[b, h].numpy(), want, rtol=1e-9, atol=1e-15)
            past = sorted(head.columns[i] for i in head.past)
            assert obs.past[b, h].nonzero().flatten().tolist() == past
            assert obs.order[b, h, : len(head.columns)].tolist() == head.columns


def test_weighted_attention_is_the_weighted_sum():
    obs, _ = observation(queries=5, ragged=True, rows=2)
    weight = torch.rand(2, 5, dtype=torch.float64)
    want = (attention_BHWC(obs) * weight[:, None, :, None]).sum(2)
    torch.testing.assert_close(weighted_attention(obs, weight), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_below_float64_all_is_float32(dtype):
    obs, _ = observation(dtype=dtype)
    assert attention_BHWC(obs).dtype == torch.float32


def test_hidden_is_what_the_next_query_cannot_see():
    """The next query, at 24, sees 19..24 through a window of 6: 18 and older will never be seen again."""
    obs, _ = observation(columns=24, sliding_window=6)
    assert obs.q_pos[0, -1] == 23
    assert obs.pos[obs.hidden].unique().tolist() == list(range(19))
    assert not replace(obs, sliding_window=None).hidden.any()


def test_roots_measure_projected_lengths():
    random = torch.Generator().manual_seed(0)
    w_o = torch.randn(32, 6, 4, generator=random, dtype=torch.float64)
    u = torch.randn(6, 4, generator=random, dtype=torch.float64)
    lengths = torch.stack([(w_o[:, h] @ u[h]).norm() for h in range(6)])
    torch.testing.assert_close(torch.einsum("hd,hdf->hf", u, root_of(w_o)).norm(dim=-1), lengths)
    joint = torch.stack(
        [torch.stack([w_o[:, h] @ u[h] for h in heads]).sum(0).norm() for heads in (range(3), range(3, 6))]
    )
    grouped = u.view(2, 3, 4)
    torch.testing.assert_close(torch.einsum("kgd,kgdf->kf", grouped, group_root_of(w_o, 2)).norm(dim=-1), joint)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_a_root_is_no_wider_than_what_it_stands_for(width):
    w_o = torch.randn(width, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root, group = root_of(w_o), group_root_of(w_o, 2)
    assert root.shape == (6, 4, min(4, width)) and group.shape == (2, 3, 4, min(12, width))
    torch.testing.assert_close(root @ root.mT, torch.einsum("ehd,ehc->hdc", w_o, w_o))


def test_roots_of_half_precision_weights_are_float32():
    w_o = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert root_of(w_o).dtype == torch.float32 and group_root_of(w_o, 2).dtype == torch.float32
    want = root_of(w_o.double())
    torch.testing.assert_close(root_of(w_o) @ root_of(w_o).mT, (want @ want.mT).float(), rtol=1e-5, atol=1e-4)

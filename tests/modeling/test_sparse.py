"""Attention over listed blocks: both backends against an explicit mask."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.sparse import SHAPES, random_map, tensors
from modeling.attention import causal_attention
from modeling.sparse import BlockMap, reachable, sparse_attention
from restkv.mass import column_mass
from twins.reference_sparse import blocks_with, mask_of, masked_output, masked_weights

# -- attention over listed blocks


def test_what_is_in_reach_by_hand():
    """Size 4, window 3: queries 8 ... 11 see the keys 6 ... 11; with window 2 query 8 sees 7; with window 1 only itself."""
    expected = {None: [True, True, True], 5: [False, True, True], 2: [False, True, True], 1: [False, False, True]}
    for window, row in expected.items():
        assert reachable(3, 4, window, torch.device("cpu"))[2].tolist() == row


@settings(max_examples=20)
@given(blocks=st.integers(1, 6), size=st.sampled_from([1, 4, 8]), window=st.sampled_from([None, 1, 2, 5, 8, 9, 17]))
def test_what_is_in_reach(blocks, size, window):
    slow = blocks_with(lambda q, k: window is None or q - k < window, blocks * size, size)
    assert torch.equal(reachable(blocks, size, window, torch.device("cpu")), slow)
    everything = BlockMap(slow.expand(2, -1, -1), size)
    assert float(everything.share(window)) == 1.0


@settings(max_examples=60)
@given(shape=SHAPES, chunk=st.integers(1, 3))
def test_sparse_attention_is_attention_under_an_explicit_mask(shape, chunk):
    """Outputs, and the attention that columns collect, chunk by chunk."""
    q_HLD, k_KLD, v_KLD = tensors(**shape)
    length, size, window = shape["length"], shape["size"], shape["window"]
    chosen = random_map(shape["seed"], len(q_HLD), length, size, window, shape["share"])
    how = {"scale": 0.5, "softcap": shape["softcap"], "window": window}
    weights_HLL = masked_weights(q_HLD, k_KLD, mask_of(chosen.listed_HMM, size, length, window), 0.5, shape["softcap"])
    parts, mass_HL = [], torch.zeros(len(q_HLD), length)
    for start in range(0, length, chunk * size):
        q_THD = q_HLD[:, start : start + chunk * size].transpose(0, 1)
        parts.append(sparse_attention(q_THD, k_KLD, v_KLD, start, chosen, backend="sdpa", **how))
        stop = start + len(q_THD)
        mass_HL[:, :stop] += column_mass(q_THD, k_KLD[:, :stop], start, chosen=chosen, **how)
    torch.testing.assert_close(torch.cat(parts).transpose(0, 1), masked_output(weights_HLL, v_KLD), rtol=0, atol=1e-5)
    torch.testing.assert_close(mass_HL.double(), weights_HLL.sum(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(
    shape=SHAPES,
    chunk=st.integers(1, 70),
    elements=st.sampled_from([1, 400, 4000, 1 << 21]),
    sharpness=st.sampled_from([1, 30]),
)
def test_attention_that_columns_collect_in_blocks_of_any_size(shape, chunk, elements, sharpness):
    """Sharp attention too, whose smallest weights are no normal float32."""
    q_HLD, k_KLD, _ = tensors(**shape)
    q_HLD = q_HLD * sharpness
    length, window = shape["length"], shape["window"]
    q_L1, k_L = torch.arange(length)[:, None], torch.arange(length)
    seen_LL = (k_L <= q_L1) & (k_L > q_L1 - (length if window is None else window))
    weights_HLL = masked_weights(q_HLD, k_KLD, seen_LL.expand(len(q_HLD), -1, -1), 0.5, shape["softcap"])
    mass_HL = torch.zeros(len(q_HLD), length)
    with mock.patch("restkv.mass.chunk_elements", return_value=elements):
        for start in range(0, length, chunk):
            q_THD = q_HLD[:, start : start + chunk].transpose(0, 1)
            stop = start + len(q_THD)
            how = {"scale": 0.5, "softcap": shape["softcap"], "window": window}
            mass_HL[:, :stop] += column_mass(q_THD, k_KLD[:, :stop], start, **how)
    torch.testing.assert_close(mass_HL.double(), weights_HLL.sum(1), rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(shape=SHAPES)
def test_all_blocks_are_dense_attention(shape):
    q_HLD, k_KLD, v_KLD = tensors(**shape)
    chosen = random_map(0, len(q_HLD), shape["length"], shape["size"], shape["window"], share=1.1)
    how = {"scale": 0.5, "softcap": shape["softcap"], "window": shape["window"]}
    ours = sparse_attention(q_HLD.transpose(0, 1), k_KLD, v_KLD, 0, chosen, backend="sdpa", **how)
    dense = causal_attention(q_HLD.transpose(0, 1), k_KLD, v_KLD, 0, **how)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    assert float(chosen.share(shape["window"])) == 1.0


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_compiled_graph_serves_all_lengths_windows_and_listings(softcap):
    torch._dynamo.reset()
    counted, seen = torch._dynamo.utils.counters["stats"], []
    for seed, (length, window, share) in enumerate(
        [(33, None, 0.5), (700, None, 0.3), (1500, 100, 0.5), (64, 1, 1.0), (1024, 31, 0.7), (1300, None, 0.0)]
    ):
        q_HLD, k_KLD, v_KLD = (t.float() for t in tensors(seed, length, 2, 3, 16))
        chosen = random_map(seed, 6, length, 32, window, share)
        how: dict[str, Any] = {"scale": 0.25, "softcap": softcap, "window": window}
        for start in range(0, length, 1024):
            q_THD = q_HLD[:, start : start + 1024].transpose(0, 1)
            ours, slow = (
                sparse_attention(q_THD, k_KLD, v_KLD, start, chosen, backend=backend, **how)
                for backend in ("flex", "sdpa")
            )
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-5)
        seen.append(counted["unique_graphs"])
    assert len(set(seen)) == 1
    torch._dynamo.reset()

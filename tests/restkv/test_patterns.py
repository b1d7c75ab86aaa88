"""Patterns of sparse prefill: what they list equals what their slow twins list; how they are written and refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from make.sparse import tensors
from restkv.errors import PromptError
from restkv.patterns import AShape, FlexPrefill, VerticalSlash, parse_prefill, vertical_and_slash
from twins.reference_sparse import choose_slowly

# -- patterns


PATTERNS = st.one_of(
    st.builds(AShape, block=st.just(32), sinks=st.sampled_from([0, 1, 40]), local=st.sampled_from([1, 32, 33, 70])),
    st.builds(VerticalSlash, block=st.just(32), vertical=st.integers(30, 60), slash=st.integers(50, 140)),
    st.builds(
        FlexPrefill,
        block=st.just(32),
        gamma=st.sampled_from([0.3, 0.6, 0.9]),
        tau=st.sampled_from([0.0, 0.1, 0.3, 2.0]),
        min_budget=st.sampled_from([1, 33, 64]),
        max_budget=st.sampled_from([None, 96]),
    ),
)


@settings(max_examples=40)
@given(
    pattern=PATTERNS,
    seed=st.integers(0, 1 << 20),
    length=st.integers(141, 200),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    window=st.sampled_from([None, None, 20, 90]),
    softcap=st.sampled_from([None, None, 2.0]),
    scale=st.sampled_from([0.05, 0.5]),
)
def test_patterns_list_what_their_slow_twins_list(pattern, seed, length, kv_heads, group, window, softcap, scale):
    q_HLD, k_KLD, _ = tensors(seed, length, kv_heads, group, 8)
    chosen = pattern.choose(q_HLD, k_KLD, scale, softcap, window)
    slow_HMM = choose_slowly(pattern, q_HLD, k_KLD, scale, softcap, window)
    assert torch.equal(chosen.listed_HMM, slow_HMM)
    assert chosen.listed_HMM.diagonal(dim1=1, dim2=2).all()
    assert window is not None or isinstance(pattern, AShape) or chosen.listed_HMM[:, :, 0].all()


def test_vertical_and_slash_by_hand():
    """Two queries over three keys: query 1 halves between keys 0 and 1, query 2 has 1/5, 1/5, 3/5 for the keys 0, 1, 2."""
    q_HWD = torch.ones(1, 2, 1, dtype=torch.float64)
    k_KLD = torch.tensor([[[1.0], [1.0], [3.0]]], dtype=torch.float64).log()
    vertical_HL, slash_HL = vertical_and_slash(q_HWD, k_KLD, 1.0, None, None)
    torch.testing.assert_close(vertical_HL[0].tolist(), [0.35, 0.35, 0.3])
    torch.testing.assert_close(slash_HL[0].tolist(), [(0.5 + 0.6) / 2, (0.5 + 0.2) / 2, 0.1])


def test_a_column_and_a_distance_that_all_attention_goes_to_are_found():
    """Head 0 looks at position 70 (block 2) only, head 1 always 160 tokens (5 blocks) back, of 320 tokens in 10 blocks.

    Head 0's last 64 queries are 186 to 249 tokens from that position, the last 32 are 218 to 249: 6 in block 6, 26 in block 7.
    """
    length, at, back = 320, 70, 160
    q_HLD, k_KLD = torch.zeros(2, length, 64), torch.zeros(2, length, 64)
    q_HLD[0, :, 0] = k_KLD[0, at, 0] = 30.0
    code_LD = torch.randn(length + back, 64, generator=torch.Generator().manual_seed(0))
    code_LD = torch.nn.functional.normalize(code_LD, dim=-1)
    q_HLD[1], k_KLD[1] = 60 * code_LD[:length], code_LD[back:]  # key p carries the code of query p + back
    causal_MM = torch.ones(10, 10, dtype=torch.bool).tril()
    distance_MM = torch.arange(10)[:, None] - torch.arange(10)
    column_M = torch.isin(torch.arange(10), torch.tensor([0, 2]))
    # The nearest 100 distances touch the block distances 0 to 4; 186, first of many equals, 5 and 6.
    for pattern, distances in (
        (FlexPrefill(32, min_budget=64, tau=0.0), [0, 7]),
        (VerticalSlash(32, vertical=31, slash=101), [0, 1, 2, 3, 4, 5, 6]),
    ):
        listed_HMM = pattern.choose(q_HLD, k_KLD, 1.0, None, None).listed_HMM
        assert torch.equal(listed_HMM[0], causal_MM & (column_M | torch.isin(distance_MM, torch.tensor(distances))))
        assert listed_HMM[1][distance_MM == 5].all()


@pytest.mark.parametrize(
    ("pattern", "longest"),
    [(AShape(), 3968), (VerticalSlash(), 6096), (FlexPrefill(), 1024), (FlexPrefill(128, min_budget=1), 256)],
    ids=str,
)
def test_published_defaults_leave_prompts_dense_up_to(pattern, longest):
    assert pattern.dense(longest) and not pattern.dense(longest + 1)


def test_patterns_are_written_as_they_are_read():
    for text in (
        "a-shape",
        "a-shape:sinks=4:local=100",
        "vertical-slash:block=128:slash=700",
        "flexprefill:gamma=0.95",
    ):
        assert str(parse_prefill(text)) == text
    assert parse_prefill("flexprefill:max_budget=4096") == FlexPrefill(max_budget=4096)
    assert parse_prefill("dense") is None and parse_prefill("chunked") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sideways", "give dense, chunked, flexprefill, vertical-slash or a-shape"),
        ("dense:block=64", "'dense:block=64' is not known"),
        ("a-shape:sink=4", "'sink=4' is not OPTION=VALUE with one of block, sinks, local"),
        ("a-shape:local=many", "local is a number, not 'many'"),
        ("a-shape:local=0", "local=0; give at least 1"),
        ("a-shape:block=48", "block=48; give 32, 64 or 128"),
        ("vertical-slash:vertical=3", "vertical=3; give at least 30"),
        ("vertical-slash:slash=3", "slash=3; give at least 50"),
        ("flexprefill:gamma=1.5", "gamma=1.5"),
        ("flexprefill:tau=-1", "tau=-1"),
        ("flexprefill:max_budget=512", "max_budget=512; give at least min_budget, 1024"),
    ],
)
def test_impossible_patterns_are_refused_in_one_line(text, words):
    with pytest.raises(PromptError, match=words) as error:
        parse_prefill(text)
    assert "\n" not in str(error.value)

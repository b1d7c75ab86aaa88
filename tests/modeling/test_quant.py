"""Quantised matrices: they hold what is near to what they were made of, and whatever multiplies or reads them means the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import modeling.quant
from make.small import small_ids, small_model
from modeling import layers
from modeling.errors import ConfigError
from modeling.layers import linear
from modeling.quant import (
    ALIGNED,
    Int4,
    Int8,
    Quantised,
    lookup,
    packed_rows,
    quantise,
    quantised,
    require_operators,
    weights_of,
)
from twins.quantised import dense_twin, numbers, reach

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, type[Quantised]] = {"int8": Int8, "int4": Int4}


def quantised_matrix(kind: str, w_NE: Tensor, dtype: torch.dtype, settled: bool, piece: int = 1 << 22) -> Quantised:
    matrix = KINDS[kind](w_NE.shape, dtype, w_NE.device)
    for first in range(0, len(w_NE), piece):
        matrix.fill(first, w_NE[first : first + piece])
    if settled:
        matrix.settle()
    return matrix


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, Tensor, torch.dtype, bool]:
    """kind, numbers, the model's dtype, whether it is laid out for products."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    N = draw(st.one_of(st.integers(1, 80), st.sampled_from([64, 128])))
    E = 32 * draw(st.integers(1, 3)) if kind == "int4" else draw(st.integers(1, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    w_NE = torch.randn(N, E, generator=random) * draw(st.sampled_from([1e-3, 1.0, 30.0])) + draw(
        st.sampled_from([0.0, 2.0])
    )
    special = draw(st.integers(0, N - 1))
    w_NE[special] = draw(st.sampled_from([0.0, 1.5, -1e-8]))
    return kind, w_NE, draw(st.sampled_from(DTYPES)), draw(st.booleans())


def close(got: Tensor, want: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Equal to rounding, once in `dtype` and along the way in float32."""
    assert got.dtype == dtype
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the least number above 0
    torch.testing.assert_close(got.double(), want, rtol=1.01 * torch.finfo(dtype).eps, atol=2e-6 * size + least)


@given(matrices())
@settings(max_examples=40)
def test_codes_stand_for_the_nearest_numbers_and_everything_reads_the_same_ones(drawn):
    kind, w_NE, dtype, settled = drawn
    matrix = quantised_matrix(kind, w_NE, dtype, settled)
    twin, size = numbers(matrix), float(w_NE.abs().max())
    eps = torch.finfo(dtype).eps
    tiny = (
        16 * torch.finfo(dtype).tiny * eps if kind == "int4" else 0.0
    )  # scales below the least number of a dtype are 0
    assert ((twin - w_NE.double()).abs() <= reach(kind, w_NE, eps) + tiny).all()
    close(matrix.dense(dtype), twin, dtype, size)
    ids = torch.randint(len(w_NE), (2, 3))
    close(lookup(matrix, ids, dtype), twin[ids], dtype, size)
    assert matrix.nbytes == matrix.codes.nbytes + matrix.scales.nbytes


@given(matrices(), st.one_of(st.integers(1, 14), st.integers(23, 26)), st.booleans())
@settings(max_examples=40)
def test_products_are_those_of_the_numbers(drawn, rows, bias):
    """Few rows by torch's operators, many by pieces; a CPU that multiplies a dtype itself rounds the weights to it."""
    kind, w_NE, dtype, settled = drawn
    matrix = quantised_matrix(kind, w_NE, dtype, settled)
    twin = numbers(matrix)
    x_1TE, bias_N = torch.randn(1, rows, w_NE.shape[1]).to(dtype), torch.randn(len(w_NE)).to(dtype)
    y_1TN = linear(x_1TE, matrix, bias_N if bias else None)
    exact = x_1TE.double() @ twin.T + (bias_N.double() if bias else 0.0)
    assert y_1TN.dtype == dtype and y_1TN.shape == (1, rows, len(w_NE))
    length = (
        x_1TE.double().norm(dim=-1, keepdim=True) * twin.norm(dim=-1) + 1
    )  # of the sum, whose rounding is a part of it
    assert ((y_1TN.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * length).all()


@given(st.data())
@settings(max_examples=15)
def test_a_matrix_is_filled_and_stored_by_any_pieces(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    w_NE = torch.randn(2 * ALIGNED, 64)
    plain = quantised_matrix(kind, w_NE, torch.bfloat16, settled=False)
    packed = quantised_matrix(kind, w_NE, torch.bfloat16, True, piece=data.draw(st.integers(1, 150)))
    first = data.draw(st.integers(0, 127))
    last = data.draw(st.integers(first + 1, 128))
    again = KINDS[kind](w_NE.shape, torch.bfloat16, w_NE.device)
    for begin, end in ((0, first), (first, last), (last, 128)):
        again.refill(begin, *packed.stored(begin, end))
    for one, other, whole in zip(
        packed.stored(first, last), again.stored(first, last), plain.stored(0, 128), strict=True
    ):
        assert torch.equal(one, other) and torch.equal(one, whole[first:last])


def test_values_on_a_grid_of_sixteen_come_back():
    """As those of a Q4_1 file do: in every group some number has code 0 and some code 15."""
    codes_NGX = torch.randint(16, (20, 3, 32))
    codes_NGX[..., 3], codes_NGX[..., 20] = 0, 15
    w_NE = (codes_NGX * torch.rand(20, 3, 1).half().float() + torch.randn(20, 3, 1).half().float()).flatten(1)
    torch.testing.assert_close(
        numbers(quantised_matrix("int4", w_NE, torch.float32, True)), w_NE.double(), atol=2e-6, rtol=0
    )


def test_torch_packs_in_a_way_that_is_known_here_and_one_that_is_not_is_left_alone(monkeypatch):
    w_NE = torch.randn(64, 32)
    want = quantised_matrix("int4", w_NE, torch.bfloat16, settled=True)
    assert want.packed == packed_rows()
    monkeypatch.setattr(modeling.quant, "_pack", lambda code_nE: torch.zeros(len(code_nE), code_nE.shape[1] // 2))
    assert packed_rows.__wrapped__() == 0
    monkeypatch.setattr(modeling.quant, "packed_rows", lambda: 0)
    alone = quantised_matrix("int4", w_NE, torch.bfloat16, settled=True)
    assert alone.packed == 0
    x_TE = torch.randn(2, 32).bfloat16()
    torch.testing.assert_close(linear(x_TE, alone), linear(x_TE, want), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_none(kind, value):
    w_NE = torch.randn(64, 32)
    w_NE[5, 7] = value
    matrix = quantised_matrix(kind, w_NE, torch.bfloat16, settled=True)
    assert not matrix.take(torch.tensor(5), torch.bfloat16).isfinite().all()
    assert linear(torch.ones(1, 32).bfloat16(), matrix).isfinite().logical_not().nonzero().tolist() == [[0, 5]]


def test_a_torch_without_the_operators_is_refused_and_so_are_other_weights(monkeypatch):
    with pytest.raises(ConfigError, match="weights 'int3' are not known; give auto, int8 or int4"):
        require_operators("int3")
    monkeypatch.setattr(modeling.quant, "MISSING", ["_weight_int8pack_mm"])
    with pytest.raises(
        ConfigError, match=r"weights 'int8': torch .* lacks the operator _weight_int8pack_mm; install torch"
    ):
        quantise(small_model(), "int8")


@pytest.mark.parametrize(
    ("weights", "hidden", "kinds"), [("int8", 64, {"int8"}), ("int4", 64, {"int4"}), ("int4", 24, {"int8", "int4"})]
)
def test_every_matrix_is_held_in_codes_and_all_else_as_it_was(weights, hidden, kinds):
    """int4 wants inputs in multiples of 32: 24 are none, but the 32 of the heads are."""
    model = small_model(hidden=hidden, qkv_bias=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantise(model, weights)
    matrices = quantised(model)
    assert {name for name, p in before.items() if p.dim() == 2} == set(matrices)
    assert {matrix.kind for matrix in matrices.values()} == kinds and weights_of(model) == weights
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items() if p.dim() == 1)
    assert model.dtype == torch.float32 and sum(m.nbytes for m in matrices.values()) < 0.4 * sum(
        before[name].nbytes for name in matrices
    )


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_is_the_dense_one_of_its_numbers(weights, tied):
    model = small_model(hidden=64, head_dim=16, tie_embeddings=tied, o_bias=True, mlp_bias=True)
    quantise(model, weights)
    twin, ids = dense_twin(model), torch.tensor([small_ids(20)])
    assert not quantised(twin) and weights_of(twin) is None
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        torch.testing.assert_close(block.output_weight(), other.output_weight(), rtol=1e-6, atol=1e-6)
    x_1TE = model.embed(ids)
    torch.testing.assert_close(x_1TE, twin.embed(ids), rtol=1e-6, atol=1e-6)
    for rows in (1, 20):
        o_BTHD = torch.randn(1, rows, 4, 16)
        for one, other in zip(model.blocks, twin.blocks, strict=True):
            for mine, theirs in zip(one.unrotated(x_1TE[:, :rows]), other.unrotated(x_1TE[:, :rows]), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                one.finish(x_1TE[:, :rows], o_BTHD), other.finish(x_1TE[:, :rows], o_BTHD), rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(model.head(x_1TE[:, :rows]), twin.head(x_1TE[:, :rows]), rtol=1e-4, atol=1e-4)


def test_compiled_products_of_one_row_are_the_products():
    """By the operators, in one graph."""
    torch._dynamo.reset()
    w_NE, x_11E = torch.randn(128, 96), torch.randn(1, 1, 96)
    made: list[Any] = [quantised_matrix(kind, w_NE, torch.bfloat16, True) for kind in KINDS]
    x_11E = x_11E.bfloat16()

    def every(x_11E: Tensor, ids: Tensor) -> list[Tensor]:
        return [linear(x_11E, one) for one in made] + [lookup(one, ids, torch.bfloat16) for one in made]

    ids = torch.tensor([[3, 70]])
    run = torch.compile(every, fullgraph=True, dynamic=False)
    for got, want in zip(run(x_11E, ids), every(x_11E, ids), strict=True):
        eps = torch.finfo(got.dtype).eps
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2 * eps, atol=40 * eps)
    torch._dynamo.reset()


def test_long_prompts_meet_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(layers, "WIDENED_WEIGHTS", 32 * ALIGNED)
    w_NE, x_TE = torch.randn(3 * ALIGNED - 7, 32), torch.randn(40, 32)
    for kind in KINDS:
        matrix = quantised_matrix(kind, w_NE, torch.float32, settled=True)
        assert len(list(matrix.pieces(layers.WIDENED_WEIGHTS))) == 3
        torch.testing.assert_close(
            linear(x_TE, matrix).double(), x_TE.double() @ numbers(matrix).T, rtol=1e-5, atol=1e-4
        )

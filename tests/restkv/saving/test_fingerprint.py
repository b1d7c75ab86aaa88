"""The fingerprint of a model: of every bit of its weights, read once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import restkv
from make.effort import many
from make.small import small_ids, small_model
from modeling.layers import Decoder
from restkv.context import CompressedContext
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.policies import FullCache
from restkv.saving import fingerprint as module
from restkv.saving.fingerprint import PIECE, fingerprint, sampled


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of the pieces that were read."""
    sizes: list[int] = []
    lock, piece = threading.Lock(), module._piece

    def counted(tensor: Tensor) -> bytes:
        with lock:
            sizes.append(tensor.nbytes)
        return piece(tensor)

    monkeypatch.setattr(module, "_piece", counted)
    yield sizes


def words(model: Decoder) -> dict[str, Tensor]:
    """The weights as whole numbers of their width, in the same memory."""
    widths = {2: torch.int16, 4: torch.int32}
    return {name: weight.view(widths[weight.element_size()]).view(-1) for name, weight in model.state_dict().items()}


MODELS = {"float32": small_model(4), "bfloat16": small_model(4).bfloat16()}


@pytest.mark.parametrize("dtype", MODELS)
@given(data=st.data())
@settings(max_examples=many(100, 2))
def test_every_bit_counts(dtype, data):
    model = MODELS[dtype]
    before = fingerprint(model)
    held = words(model)
    tensor = held[data.draw(st.sampled_from(sorted(held)))]
    at, bit = data.draw(st.integers(0, len(tensor) - 1)), data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    tensor[at] ^= 1 << bit
    assert fingerprint(model) != before
    tensor[at] ^= 1 << bit
    assert fingerprint(model) == before


def test_places_count():
    """Rows that change places, tensors that do, and a tensor of another shape, all of the same numbers."""
    model = small_model(4)
    names = {fingerprint(model)}
    embed, (first, second) = model.embed_tokens.weight, (model.blocks[0].o_proj, model.blocks[1].o_proj)
    embed[[3, 5]] = embed[[5, 3]]
    names.add(fingerprint(model))
    first.weight, second.weight = second.weight, first.weight
    names.add(fingerprint(model))
    first.weight = torch.nn.Parameter(first.weight.detach().view(first.weight.shape[1], -1, 1), requires_grad=False)
    names.add(fingerprint(model))
    assert len(names) == 4


def test_weights_of_many_pieces_count_to_the_last_number():
    model = small_model(4)
    numbers = PIECE // 4
    model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(2 * numbers + 3, 1), requires_grad=False)
    names = {fingerprint(model)}
    for at in (0, numbers - 1, numbers, 2 * numbers - 1, 2 * numbers, -1):
        model.embed_tokens.weight[at] = 1
        names.add(fingerprint(model))
        model.embed_tokens.weight[at] = 0
    assert len(names) == 7


def test_the_same_weights_have_the_same_name_wherever_they_lie():
    model = small_model(4)
    again, turned = copy.deepcopy(model), copy.deepcopy(model)
    weight = turned.blocks[0].down_proj.weight
    turned.blocks[0].down_proj.weight = torch.nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    assert not turned.blocks[0].down_proj.weight.is_contiguous()
    with torch.inference_mode():
        inference = copy.deepcopy(model)
    assert fingerprint(model) == fingerprint(again) == fingerprint(turned) == fingerprint(inference)
    assert fingerprint(model) != fingerprint(copy.deepcopy(model).bfloat16())


def test_weights_are_read_once_until_they_change(read):
    model = small_model(4)
    fingerprint(model)
    whole = sum({weight.data_ptr(): weight.nbytes for weight in model.state_dict().values()}.values())
    assert sum(read) == whole
    fingerprint(model)
    assert sum(read) == whole
    model.blocks[0].o_proj.weight.mul_(2)  # written to
    fingerprint(model)
    assert sum(read) == 2 * whole
    model.blocks[0].o_proj.weight.data += 1  # written to where nobody counts: a sample differs
    fingerprint(model)
    assert sum(read) == 3 * whole
    model.bfloat16()
    fingerprint(model)
    assert sum(read) == 3.5 * whole


def test_a_model_with_some_rows_retrained_is_another(tmp_path):
    """The sample of versions before takes both for one."""

    def made(change: bool) -> LM:
        model = small_model(4)
        model.embed_tokens.weight = torch.nn.Parameter(
            torch.randn(32_000, 24, generator=generator()), requires_grad=False
        )
        if change:
            model.embed_tokens.weight[1001:1020] = torch.randn(19, 24)
        return LM(model, None)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    one, other = made(False), made(True)
    assert sampled(one.model) == sampled(other.model)
    path: Any = tmp_path / "context"
    one.compress(small_ids(20, 3), FullCache()).save(path)
    with pytest.raises(PromptError, match=r"made with the model .*, this one is .*; load it with that model"):
        CompressedContext.load(path, other)
    assert restkv.CompressedContext.load(path, made(False)).tokens == 20

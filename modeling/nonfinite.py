"""Logits that are no numbers: whether they are, where in the model they began, and what to do about it.

Letters: B batch rows, L tokens, E hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modeling.errors import NumericError
from modeling.forward import CHUNK, dense_layer
from modeling.layers import Block, Decoder
from modeling.quant import lookup
from modeling.room import lacking


def sound(logits_BV: Tensor) -> Tensor:
    """Bool [B]: a token can be drawn from these logits. -inf in some of them, as of a padded vocabulary, does no harm."""
    return logits_BV.amax(-1).isfinite()  # of NaN and anything the largest is NaN


def numeric_error(model: Decoder, ids: Sequence[int], row: int | None = None) -> NumericError:
    """What to raise where logits are not `sound`: the line says which part of the model made the first value that is no number.

    It is looked for in a second pass over the same tokens, with the full cache.

    Args:
        ids: what has been read, as far as it is known.
        row: of a batch.
    """
    place = _first(model, ids) if ids else None
    where = f"after {len(ids)} tokens" + ("" if row is None else f" of row {row}")
    head = f"the logits {where} are no numbers: "
    dtype = str(model.dtype).removeprefix("torch.")
    narrow = "load the model in bfloat16 or float32 (--dtype bfloat16)"
    weights = "--check-weights names the tensors that hold NaN or infinity (in Python: check_weights=True)"
    if place is None:
        mend = f"{narrow}, or with another cache" if dtype == "float16" else f"try another method or prefill; {weights}"
        return NumericError(f"{head}reading the same with a full cache makes numbers; {mend}")
    head += f"{place.value} first comes out of {place.name}, "
    if place.broken:
        also = f", in the file or in {dtype}, which ends at 65504; {narrow}, or else" if dtype == "float16" else ";"
        return NumericError(f"{head}whose weights hold NaN or infinity{also} {weights}")
    if dtype == "float16":
        return NumericError(f"{head}too large for float16, which ends at 65504; {narrow}")
    return NumericError(
        f"{head}whose weights are finite, but too large for {dtype}: damaged, or of another model; {weights}"
    )


class _Found(Exception):
    """Where the first value that is no number was made."""

    def __init__(self, name: str, x: Tensor, weights: Iterable[Tensor]) -> None:
        self.name = name
        self.value = "NaN" if bool(x.isnan().any()) else "infinity"
        self.broken = not all(bool(weight.isfinite().all()) for weight in weights)


class _Watched:
    """A block that looks at what it makes."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def finish(self, x_BTE: Tensor, o_BTHD: Tensor) -> Tensor:
        x_BTE = self._block.add_attention(x_BTE, o_BTHD)
        _look(x_BTE, f"layer {self._block.index}'s attention", self._block)
        x_BTE = self._block.add_mlp(x_BTE)
        _look(x_BTE, f"layer {self._block.index}'s MLP", self._block)
        return x_BTE


def _look(x: Tensor, name: str, part: nn.Module) -> None:
    if not bool(x.isfinite().all()):  # sync: an answer has ended anyway
        raise _Found(name, x, part.parameters())


def _first(model: Decoder, ids: Sequence[int]) -> _Found | None:
    """Where the first value that is no number is made when these tokens are read; None if all are numbers."""
    try:
        ids_1L = torch.tensor([list(ids)], device=model.device)
        pos_1L = torch.arange(len(ids), dtype=torch.int32, device=model.device)[None]
        x_LE = model.embed(ids_1L)[0].clone()
        wrong_L = ~x_LE.isfinite().all(-1)
        if bool(wrong_L.any()):
            token = ids[int(wrong_L.to(torch.uint8).argmax())]
            row_1E = lookup(model.embed_tokens.weight, ids_1L.new_tensor([token]), model.dtype)
            return _Found(f"the embedding of token {token}", x_LE, [row_1E])
        rotary = model.rotary(pos_1L, pos_1L.amax(-1) + 1)
        for block in model.blocks:
            dense_layer(model, cast(Block, _Watched(block)), x_LE, rotary, last=0)
        matrix = model.embed_tokens if model.lm_head is None else model.lm_head
        for x_lE in (x_LE[-1:], *x_LE.split(CHUNK)):  # the last first: it is mostly that
            logits_lV = model.head(x_lE)
            if not bool(sound(logits_lV).all()):
                return _Found("the output matrix", logits_lV, [*model.norm.parameters(), *matrix.parameters()])
    except _Found as found:
        return found
    except (MemoryError, RuntimeError) as error:
        if lacking(error) is None:  # dense attention may need more than what has been run
            raise
    return None

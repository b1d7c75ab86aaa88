"""What quantised matrices stand for, number by number in float64: the slow twin of modeling/quant.py; and whole models of it.

Letters: N rows of a matrix, E its columns.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from modeling.layers import Decoder
from modeling.quant import Quantised, quantised


def numbers(matrix: Quantised) -> Tensor:
    """The matrix [N, E] in float64, from its codes and scales as a file holds them."""
    N, E = matrix.shape
    codes, scales = (part.tolist() for part in matrix.stored(0, N))
    if matrix.kind == "int8":
        return torch.tensor([[code * scales[n] for code in codes[n]] for n in range(N)], dtype=torch.float64)
    rows = []
    for n in range(N):
        row = []
        for e in range(E):
            group, place = divmod(e, 32)
            byte = codes[n][16 * group + place % 16]
            scale, zero = scales[n][group]
            row.append(((byte & 15 if place < 16 else byte >> 4) - 8) * scale + zero)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def reach(kind: str, w_NE: Tensor, eps: float) -> Tensor:
    """How far from its number a code may be, [N, E] in float64: half a step of the row's or group's grid, and what rounding the
    scale and the zero to a dtype of this `eps` adds."""
    if kind == "int8":
        return w_NE.double().abs().amax(-1, keepdim=True).expand_as(w_NE) / 127 * 0.5001
    w_NGX = w_NE.double().unflatten(-1, (-1, 32))
    low_NG, high_NG = w_NGX.aminmax(dim=-1)
    most_NG = w_NGX.abs().amax(-1)
    return ((high_NG - low_NG) / 15 * 0.5001 + 3 * eps * most_NG)[..., None].expand_as(w_NGX).flatten(-2)


def dense_twin(model: Decoder) -> Decoder:
    """A copy with a plain matrix, of what the codes stand for, in the place of every quantised one."""
    twin = copy.deepcopy(model)
    for name in quantised(model):
        holder = twin.get_submodule(name.rpartition(".")[0])
        matrix = holder.weight
        assert isinstance(matrix, Quantised)
        plain = numbers(matrix).to(model.dtype)
        del holder.weight
        holder.weight = nn.Parameter(plain, requires_grad=False)
    return twin

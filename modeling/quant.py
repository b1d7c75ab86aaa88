"""Matrices of 8 and 4 bits: codes and scales, made a few rows at a time, and the products with them.

int8: w = code * scale, codes from -127 to 127 and one float32 scale per row.
int4: w = (code - 8) * scale + zero, codes from 0 to 15, a scale and a zero for every 32 inputs of a row, in the model's dtype. A
matrix whose inputs are no multiple of 32 is held as int8.

Letters: N rows of a matrix (outputs), E its columns (inputs), n some of the rows, G = E / 32 groups of a row, J bytes of a group
(16), T rows of x, P rows that torch packs together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from modeling.errors import ConfigError

WEIGHTS = ("int8", "int4")
GROUP = 32  # inputs of an int4 row that share a scale and a zero
HALF = GROUP // 2
# Rows at a time: torch's operators read beyond the end where there is a part of such a lot, or of GROUP inputs.
ALIGNED = 64
# Of sums of codes of 8 bits times numbers: of 4,096 of them, 128 times 100 each, float16 holds the total.
UNIT = 2.0**-10
PIECE = 1 << 22  # numbers that are made or packed at a time (16 MiB of int32)
# Private operators of torch (2.11 to 2.13 have them): the product with int8 codes, that with packed int4 ones, and their packing.
INT8, INT4, PACK = OPERATORS = (
    "_weight_int8pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_convert_weight_to_int4pack_for_cpu",
)
MISSING = [name for name in OPERATORS if not hasattr(torch.ops.aten, name)]
# What those operators multiply with vector instructions. In float32, which they take too, they are up to 14 times slower than
# making the rows anew (AVX2, 1 to 16 rows of x).
MULTIPLIED = (torch.bfloat16, torch.float16)


class Quantised(nn.Module):
    """A matrix [N, E] as codes and scales. A projection or an embedding has it as its `weight`, in the place of a tensor.

    Attributes:
        kind: one of WEIGHTS.
        shape: of the matrix.
        few: up to so many rows of x torch's operator is faster than making the rows of the matrix anew (AVX2, bfloat16).
        last: so many rows lie as torch packs them.
        codes, scales: as the module's docstring and the subclass say; parameters, so that whoever counts the bytes of a model's
            parameters counts what is there.
    """

    kind: str
    few: int
    last = 0

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Empty: to be filled, and then settled. `dtype` is the model's."""
        super().__init__()
        self.shape = shape
        codes, scales = self.room(shape[0], shape[1], dtype)
        self.codes = nn.Parameter(torch.empty_like(codes, device=device), requires_grad=False)
        self.scales = nn.Parameter(torch.empty_like(scales, device=device), requires_grad=False)

    @staticmethod
    def room(N: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What codes and scales are like, on the meta device."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def fill(self, first: int, w_nE: Tensor) -> None:
        """Quantise the rows from `first` on."""
        raise NotImplementedError

    def refill(self, first: int, codes_nX: Tensor | None, scales_nY: Tensor | None) -> None:
        """Take the rows from `first` on as `stored` gave them, the codes or the scales or both."""
        raise NotImplementedError

    def stored(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of some rows as files hold them, the same on every machine."""
        raise NotImplementedError

    def repeats(self, first: int, w_nE: Tensor) -> bool:
        """Whether the rows from `first` on are these numbers, quantised; to be asked before they are settled."""
        other = type(self)(w_nE.shape, self.scales.dtype, w_nE.device)
        other.fill(0, w_nE)
        mine, theirs = self.stored(first, first + len(w_nE)), other.stored(0, len(w_nE))
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, theirs, strict=True))  # sync: while loading

    def settle(self) -> None:
        """Called once all rows are there: lay the codes out as this machine multiplies them."""

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Some rows as numbers [n, E]; `first` is a multiple of ALIGNED, and so is `last` but for N."""
        raise NotImplementedError

    def take(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these numbers [..., E]: an embedding's look-up."""
        raise NotImplementedError

    def product(self, x_TE: Tensor) -> Tensor | None:
        """x times the matrix, [T, N] in x's dtype, for few rows of x; None where nothing here is faster than `rows`."""
        last = self.multiplied(x_TE) if len(x_TE) <= self.few else 0
        if last:
            y_Tn, N = self.times(x_TE, last), self.shape[0]
            if last == N:
                return y_Tn
            rest_nE = self.rows(last, N, wider(x_TE.dtype))
            return torch.cat((y_Tn, nn.functional.linear(x_TE.to(rest_nE.dtype), rest_nE).to(x_TE.dtype)), -1)
        if len(x_TE) == 1 and x_TE.device.type != "cpu" and not self.last and torch.compiler.is_compiling():
            return self.fused(x_TE.to(wider(x_TE.dtype))[0]).to(x_TE.dtype)[None]
        return None

    def multiplied(self, x_TE: Tensor) -> int:
        """How many rows torch's operator takes: all but a part of a lot; 0 where it takes none."""
        raise NotImplementedError

    def times(self, x_TE: Tensor, last: int) -> Tensor:
        """x times those rows by torch's operator, [T, last] in x's dtype."""
        raise NotImplementedError

    def fused(self, x_E: Tensor) -> Tensor:
        """x times all rows, [N], as multiply and sum: a compiler widens the codes while it reads them."""
        raise NotImplementedError

    def pieces(self, count: int = PIECE) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) of rows that together have about `count` numbers."""
        N, E = self.shape
        step = max(1, count // E // ALIGNED) * ALIGNED
        yield from ((first, min(first + step, N)) for first in range(0, N, step))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All rows as numbers [N, E]."""
        return torch.cat([self.rows(first, last, dtype) for first, last in self.pieces()])


class Int8(Quantised):
    """codes int8 [N, E], scales float32 [N].

    Attributes:
        unit: UNIT in the model's dtype [N], for torch's operator. It takes scales in x's dtype only, which would round ours, and
            nothing that a graph makes on the way (torch 2.13).
    """

    kind, few = "int8", 12
    unit: Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.register_buffer("unit", torch.empty(shape[0], dtype=dtype, device=device), persistent=False)

    def settle(self) -> None:
        self.unit.fill_(UNIT)

    @staticmethod
    def room(N: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.empty(N, E, dtype=torch.int8, device="meta"), torch.empty(N, dtype=torch.float32, device="meta")

    def fill(self, first: int, w_nE: Tensor) -> None:
        w_nE = w_nE.to(self.scales.device, torch.float32)
        scale_n = w_nE.abs().amax(-1) / 127
        code_nE = (w_nE / scale_n.masked_fill(scale_n == 0, 1)[:, None]).round_().clamp_(-127, 127)
        self.refill(first, code_nE, scale_n)

    def refill(self, first: int, codes_nX: Tensor | None, scales_nY: Tensor | None) -> None:
        for whole, rows in ((self.codes, codes_nX), (self.scales, scales_nY)):
            if rows is not None:
                whole[first : first + len(rows)] = rows

    def stored(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self.codes[first:last], self.scales[first:last]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        wide = wider(dtype)
        return self.codes[first:last].to(wide).mul_(self.scales[first:last, None].to(wide)).to(dtype)

    def take(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        wide = wider(dtype)
        return (self.codes[ids].to(wide) * self.scales[ids].to(wide)[..., None]).to(dtype)

    def multiplied(self, x_TE: Tensor) -> int:
        N, E = self.shape
        fits = (
            x_TE.device.type == "cpu" and x_TE.dtype == self.unit.dtype and x_TE.dtype in MULTIPLIED and E % GROUP == 0
        )
        return N - N % ALIGNED if fits else 0

    def times(self, x_TE: Tensor, last: int) -> Tensor:
        y_Tn = torch.ops.aten._weight_int8pack_mm(x_TE.contiguous(), self.codes[:last], self.unit[:last])
        return (y_Tn * (self.scales[:last] / UNIT)).to(x_TE.dtype)

    def fused(self, x_E: Tensor) -> Tensor:
        return (self.codes * x_E).sum(-1) * self.scales.to(x_E.dtype)


class Int4(Quantised):
    """codes uint8 [N, E / 2], two in a byte; scales [G, N, 2] in the model's dtype: scale, and zero, which code 8 stands for.

    As filled and stored, byte j of a group has its input j in the lower half and input 16 + j in the upper one, which is the
    order of GGUF's Q4_1. `settle` has torch pack the codes in place, for its product on CPUs: then P rows (32 with AVX2, 64 with
    AVX512) lie together, input after input, and byte j of an input has row j in its lower half and row P / 2 + j in the upper.

    Attributes:
        packed: P; 0 while codes lie as they are stored. `last` rows are packed then, all but a part of a lot at the end.
    """

    kind, few = "int4", 24
    packed = 0

    @staticmethod
    def room(N: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes = torch.empty(N, E // 2, dtype=torch.uint8, device="meta")
        return codes, torch.empty(E // GROUP, N, 2, dtype=dtype, device="meta")

    def fill(self, first: int, w_nE: Tensor) -> None:
        dtype = self.scales.dtype
        w_nGX = w_nE.to(self.scales.device, torch.float32).unflatten(-1, (-1, GROUP))
        low_nG, high_nG = w_nGX.aminmax(dim=-1)
        scale_nG = ((high_nG - low_nG) / 15).to(dtype)  # as they are kept, so that codes make up for the rounding
        zero_nG = (low_nG + 8 * scale_nG.float()).to(dtype)
        step_nG = scale_nG.float().masked_fill(scale_nG == 0, 1)
        code_nGX = (
            ((w_nGX - zero_nG.float()[..., None]) / step_nG[..., None] + 8).round_().clamp_(0, 15).to(torch.uint8)
        )
        self.refill(first, _joined(code_nGX), torch.stack((scale_nG, zero_nG), -1))

    def refill(self, first: int, codes_nX: Tensor | None, scales_nY: Tensor | None) -> None:
        assert not self.packed, "rows are filled before they are packed"
        if codes_nX is not None:
            self.codes[first : first + len(codes_nX)] = codes_nX
        if scales_nY is not None:
            self.scales[:, first : first + len(scales_nY)] = scales_nY.to(self.scales.device).transpose(0, 1)

    def stored(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        scales_nG2 = self.scales[:, first:last].transpose(0, 1)
        if first >= self.last:
            return self.codes[first:last], scales_nG2
        begin, end = first // self.packed * self.packed, min(last, self.last)
        code_En = self._unpacked(begin, -(-end // self.packed) * self.packed)[:, first - begin : end - begin]
        return torch.cat((_joined(code_En.T.unflatten(-1, (-1, GROUP))), self.codes[end:last])), scales_nG2

    def settle(self) -> None:
        if self.codes.device.type != "cpu" or self.scales.dtype not in MULTIPLIED or not packed_rows():
            return
        N, _ = self.shape
        self.packed, self.last = packed_rows(), N - N % ALIGNED
        for first, last in self.pieces():
            last = min(last, self.last)
            if first < last:
                self.codes[first:last] = _pack(_parted(self.codes[first:last]).flatten(1))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        if first < self.last < last:
            return torch.cat((self.rows(first, self.last, dtype), self.rows(self.last, last, dtype)))
        wide = wider(dtype)
        scales_G2n = self.scales[:, first:last].to(wide).transpose(1, 2).contiguous()
        scale_Gn, zero_Gn = scales_G2n[:, 0], scales_G2n[:, 1]
        if first >= self.last:
            w_nGX = _parted(self.codes[first:last]).to(wide).sub_(8)
            return w_nGX.mul_(scale_Gn.T[..., None]).add_(zero_Gn.T[..., None]).flatten(1).to(dtype)
        w_GXn = self._unpacked(first, last).to(wide).unflatten(0, (-1, GROUP)).sub_(8)
        return w_GXn.mul_(scale_Gn[:, None]).add_(zero_Gn[:, None]).flatten(0, 1).to(dtype).T

    def take(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        wide, code_nGX = wider(dtype), _parted(self.codes[ids])
        if self.last:
            lots_lEJ = self.codes[: self.last].view(-1, self.shape[1], self.packed // 2)
            there = ids.clamp(max=self.last - 1)
            row, half = there % self.packed, self.packed // 2
            bytes_nE = lots_lEJ[there // self.packed, :, row % half]
            code_nE = torch.where((row < half)[..., None], bytes_nE & 15, bytes_nE >> 4)
            packed_nGX = code_nE.unflatten(-1, (-1, GROUP))
            code_nGX = torch.where((ids < self.last)[..., None, None], packed_nGX, code_nGX)
        scales_nG2 = self.scales[:, ids].movedim(0, -2).to(wide)
        return ((code_nGX.to(wide) - 8) * scales_nG2[..., :1] + scales_nG2[..., 1:]).flatten(-2).to(dtype)

    def multiplied(self, x_TE: Tensor) -> int:
        return self.last if x_TE.device.type == "cpu" and x_TE.dtype == self.scales.dtype else 0

    def times(self, x_TE: Tensor, last: int) -> Tensor:
        scales_Gn2 = self.scales[:, :last].contiguous()  # of whole lots, as of nearly all models, no copy
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TE.contiguous(), self.codes[:last], GROUP, scales_Gn2)

    def fused(self, x_E: Tensor) -> Tensor:
        x_G2J, scales_NG2 = x_E.view(-1, 2, HALF), self.scales.to(x_E.dtype).transpose(0, 1)
        codes_NGJ = self.codes.unflatten(-1, (-1, HALF))
        sum_NG = ((codes_NGJ & 15) * x_G2J[:, 0] + (codes_NGJ >> 4) * x_G2J[:, 1]).sum(-1)
        all_G = x_G2J.sum((1, 2))  # of w = code * scale + (zero - 8 * scale) the second part meets all inputs alike
        return ((sum_NG - 8 * all_G) * scales_NG2[..., 0] + all_G * scales_NG2[..., 1]).sum(-1)

    def _unpacked(self, first: int, last: int) -> Tensor:
        """Codes of some packed rows, uint8 [E, n]."""
        E = self.shape[1]
        bytes_lEJ = self.codes[first:last].view(-1, E, self.packed // 2)
        code_lE2J = torch.stack((bytes_lEJ & 15, bytes_lEJ >> 4), 2)
        return code_lE2J.permute(1, 0, 2, 3).reshape(E, last - first)


Weight = Tensor | Quantised
"""A matrix of the model: what nn.Linear and nn.Embedding have as `weight`, which their own annotations call a Tensor."""


def kind_of(weights: str, columns: int) -> str:
    """How a matrix of so many inputs is held in a model of int8 or int4 weights."""
    return "int4" if weights == "int4" and columns % GROUP == 0 else "int8"


def quantise(model: nn.Module, weights: str) -> None:
    """Hold every matrix of a dense model in codes, one after the other, in place; biases and norms stay as they are.

    On the meta device, where there is nothing to quantise, the matrices become empty ones, to be filled and settled.

    Args:
        weights: one of WEIGHTS.
    Raises:
        ConfigError: no such weights, or this torch lacks an operator.
    """
    require_operators(weights)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and isinstance(module.weight, Tensor):
            numbers = module.weight.detach()
            made = Int4 if kind_of(weights, numbers.shape[1]) == "int4" else Int8
            matrix = made(numbers.shape, numbers.dtype, numbers.device)
            if not numbers.is_meta:
                for first, last in matrix.pieces():
                    matrix.fill(first, numbers[first:last])
                matrix.settle()
            del module.weight
            holder: Any = module
            holder.weight = matrix


def require_operators(weights: str) -> None:
    """Refuse weights that nobody knows, or that this torch cannot multiply.

    Raises:
        ConfigError: no such weights, or this torch lacks an operator.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r} are not known; give auto, {' or '.join(WEIGHTS)}")
    if MISSING:
        raise ConfigError(
            f"weights {weights!r}: torch {torch.__version__} lacks the operator {MISSING[0]}; install torch 2.11 to 2.13, "
            "or load the model without quantising it"
        )


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A matrix as numbers [N, E]: the tensor itself, or what its codes stand for."""
    return weight.dense(dtype) if isinstance(weight, Quantised) else weight


def lookup(weight: Weight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix by their numbers, [..., E]."""
    return weight.take(ids, dtype) if isinstance(weight, Quantised) else nn.functional.embedding(ids, weight)


def weights_of(model: nn.Module) -> str | None:
    """How a model's matrices are held: "int8", "int4" (some of them in int8, see kind_of), or None for plain numbers."""
    return min((matrix.kind for matrix in quantised(model).values()), default=None)  # "int4" before "int8"


def quantised(model: nn.Module) -> dict[str, Quantised]:
    """A model's quantised matrices by their names, such as `layers.0.o_proj.weight`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}


def wider(dtype: torch.dtype) -> torch.dtype:
    """What codes are scaled in."""
    return torch.promote_types(dtype, torch.float32)


@cache
def packed_rows() -> int:
    """P of torch's packing on this CPU: 64 or 32; 0 where it is another than Int4 knows, which is then left alone."""
    random = torch.Generator().manual_seed(0)
    code_NE = torch.randint(16, (ALIGNED, GROUP), dtype=torch.uint8, generator=random)
    packed = _pack(code_NE).flatten()
    for P in (64, 32):
        code_lEP = code_NE.view(-1, P, GROUP).transpose(1, 2)
        bytes_lEJ = code_lEP[..., : P // 2] | code_lEP[..., P // 2 :] << 4
        if torch.equal(bytes_lEJ.flatten(), packed):
            return P
    return 0


def _pack(code_nE: Tensor) -> Tensor:
    """uint8 [n, E / 2] as the product wants them; n a multiple of ALIGNED."""
    tiles = 1  # of a GPU: a CPU passes over it
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_nE.int(), tiles)


def _joined(code_nGX: Tensor) -> Tensor:
    """Codes of 4 bits [..., G, 32] two in a byte: [..., G * J]."""
    return (code_nGX[..., :HALF] | code_nGX[..., HALF:] << 4).flatten(-2)


def _parted(bytes_nX: Tensor) -> Tensor:
    """The inverse of _joined: uint8 [..., G, 32]."""
    bytes_nGJ = bytes_nX.unflatten(-1, (-1, HALF))
    return torch.cat((bytes_nGJ & 15, bytes_nGJ >> 4), -1)

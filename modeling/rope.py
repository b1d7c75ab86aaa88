"""Rotary position embedding (Su et al. 2021, half-split layout) with the stretched variants checkpoints use.

Letters: B batch rows, T tokens, D head dim, F = D / 2 frequencies. Everything here is float32 until the last cast: a
frequency off by one part in 10^3 (bfloat16) is a whole turn off after a few thousand positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair of dimensions, [F] float32 on the CPU ("dynamic": within the trained length).

    linear: Chen et al. 2023. llama3: the rule released with Llama 3.1. yarn: Peng et al. 2023, "NTK-by-parts".
    """
    # The device is said so that a model built under torch.device("meta") still has real frequencies.
    exponent_F = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    period_F = rope.theta**exponent_F
    inv_F = 1.0 / period_F
    if rope.kind == "linear":
        return inv_F / rope.factor
    if rope.kind == "llama3":
        turns_F = rope.original_positions / (2 * math.pi / inv_F)  # turns within the trained length
        keep_F = ((turns_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - keep_F) * inv_F / rope.factor + keep_F * inv_F
    if rope.kind == "yarn":
        keep_F = 1 - _yarn_ramp(rope)
        return (1 - keep_F) / (rope.factor * period_F) + keep_F * inv_F
    assert rope.kind in ("default", "dynamic"), rope.kind
    return inv_F


def _yarn_ramp(rope: RopeConfig) -> Tensor:
    """0 for dimensions that keep their frequency, 1 for those divided by the factor, linear between, [F] float32."""

    def dimension(turns: float) -> float:  # the (fractional) pair that turns so often within the trained length
        return rope.dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 1e-3  # both bounds in one place: a step
    return ((torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)


class Rotary(nn.Module):
    """cos and sin of one RopeConfig at given positions. Stateless: "dynamic" is told the length, it keeps none."""

    inv_F: Tensor

    def __init__(self, rope: RopeConfig):
        super().__init__()
        self.rope = rope
        self.register_buffer("inv_F", inverse_frequencies(rope), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # model.to(bfloat16) must not round the frequencies, nor to_empty() lose them: only the device is followed.
        super()._apply(fn, recurse)
        self.inv_F = inverse_frequencies(self.rope).to(self.inv_F.device)
        return self

    def forward(self, pos_BT: Tensor, length_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [B, T, D] of `dtype`, both halves alike. Positions below 0 (padding) count as 0.

        length_B: tokens known so far in each row; only "dynamic" reads it.
        """
        inv_BTF = self._stretched(length_B)[:, None] if self.rope.kind == "dynamic" else self.inv_F
        angle_BTF = pos_BT.clamp(min=0)[..., None].float() * inv_BTF
        angle_BTD = torch.cat((angle_BTF, angle_BTF), dim=-1)
        factor = self.rope.attention_factor
        return (angle_BTD.cos() * factor).to(dtype), (angle_BTD.sin() * factor).to(dtype)

    def _stretched(self, length_B: Tensor) -> Tensor:
        """Dynamic NTK: theta grows with the length beyond the trained one. [B, F] float32.

        theta' = theta * s, s = (f * L / L0 - (f - 1))^(D / (D - 2)), so pair i turns s^(-2i / D) times as fast.
        """
        rope = self.rope
        ratio_B = length_B.clamp(min=rope.original_positions).float() / rope.original_positions
        growth_B = (rope.factor * ratio_B - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
        exponent_F = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=length_B.device) / rope.dim
        return self.inv_F * growth_B[:, None] ** -exponent_F


def rotate(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of every head by its position's angle; same shape and dtype."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_BTD[:, :, None] + torch.cat((-second, first), dim=-1) * sin_BTD[:, :, None]


def unrotate(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """What `rotate` has turned, as it was before; a scale of the rotation (YaRN) is undone too."""
    inverse_BTD = 1 / (cos_BTD**2 + sin_BTD**2)
    return rotate(x_BTHD, cos_BTD * inverse_BTD, -sin_BTD * inverse_BTD)

"""Random numbers that are hashes of what they are for.

Without a generator they trace, need no state, and are the same at every eviction, in every row and on any device.

Letters: X heads, D and S the numbers of a matrix's rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3: 32 bits (in int64) to 32, one to one, each output bit moved by every input bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


def gaussian(
    seed: int, layer: int | Tensor, shape: tuple[int, int, int], device: torch.device, before: int = 0
) -> Tensor:
    """Normal numbers [X, D, S] in float64, of every head and place (Box & Muller 1958). `before`: heads before these."""
    X, D, S = shape
    head_X1 = torch.arange(before, before + X, device=device)[:, None]
    state_X1 = mix(torch.full_like(head_X1, seed) ^ mix(head_X1 * 4096 + layer))
    place_n = torch.arange(D * S, device=device) * 2
    radius_Xn, turn_Xn = ((mix(state_X1 ^ (place_n + i)) >> 8).double() / (1 << 24) for i in range(2))
    z_Xn = (-2 * (radius_Xn + 2**-25).log()).sqrt() * (2 * math.pi * turn_Xn).cos()
    return z_Xn.unflatten(1, (D, S))

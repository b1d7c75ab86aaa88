"""Smoothing of scores over neighbouring entries.

Neighbours are neighbours in the cache: a head's past entries in order of position, whatever was evicted between them.
At prefill that is the order of the text. Later it is the only order in which every entry has the neighbours a kernel
asks for; by position, most windows of a sparse cache would hold nothing but the entry itself.

Letters: B batch rows, X heads (query or KV), C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 1 << 14  # entries of a kernel that a policy may ask for; a line is made longer by as many


def over_past(
    pool: Callable[[Tensor, Tensor], Tensor], score_BXC: Tensor, past_BXC: Tensor, order_BXC: Tensor
) -> Tensor:
    """Apply `pool(line_BXC, count_BX)` to each head's past entries, lined up oldest first and followed by zeros.

    Args:
        score_BXC, past_BXC: scores, and which columns are past entries.
        order_BXC: columns of the head's entries, oldest first (Observation.order).

    Returns:
        The pooled scores in the columns they came from; 0 where there is no past entry.
    """
    line_BXC = score_BXC.masked_fill(~past_BXC, 0).gather(-1, order_BXC)
    pooled_BXC = pool(line_BXC, past_BXC.sum(-1))
    return torch.zeros_like(score_BXC).scatter(-1, order_BXC, pooled_BXC).masked_fill(~past_BXC, 0)


def average(line_BXC: Tensor, kernel: int) -> Tensor:
    """Centred mean over `kernel` (odd) entries; beyond the ends count zeros, as in SnapKV (docs/sources.md §1.2 item 6)."""
    return F.avg_pool1d(line_BXC, kernel, stride=1, padding=kernel // 2)


def maximum(line_BXC: Tensor, kernel: int) -> Tensor:
    """Centred maximum over `kernel` (odd) entries."""
    return F.max_pool1d(line_BXC, kernel, stride=1, padding=kernel // 2)


def shifted_average(line_BXC: Tensor, count_BX: Tensor, kernel_BX: Tensor, shift_BX: Tensor, widest: int) -> Tensor:
    """Mean of line[i + shift - kernel // 2 .. i + shift + kernel // 2] for every i, with a kernel and a shift per head.

    Beyond the ends of the head's first `count` entries the nearest of them is repeated. With count 4, kernel 3 and
    shift 1, out[0] = mean(line[0], line[1], line[2]) and out[3] = mean(line[3], line[3], line[3]).

    Sums of 1, 2, 4, ... neighbours are added up along the binary digits of the kernel. Differences of prefix sums would
    be shorter but cancel: a sink whose odds reach 1/eps leaves nothing of the small scores that follow it.

    Args:
        kernel_BX: odd, at most `widest`; a kernel and its shift must stay within `widest` entries to either side.
    """
    C = line_BXC.shape[-1]
    last_BX1 = (count_BX - 1).clamp_min(0)[..., None]
    at_L = torch.arange(-widest, C + widest, device=line_BXC.device)
    sums_BXL = line_BXC.gather(-1, at_L.clamp_min(0).minimum(last_BX1))  # sums_BXL[i] starts at line[i - widest]
    start_BXC = torch.arange(C, device=line_BXC.device) + (widest + shift_BX - kernel_BX // 2)[..., None]
    total_BXC = torch.zeros_like(line_BXC)
    for digit in range(widest.bit_length()):
        span = 1 << digit
        wanted_BX1 = (kernel_BX & span).bool()[..., None]
        # A start past the end belongs to a digit that is not wanted; the clamp only keeps the gather legal.
        part_BXC = sums_BXL.gather(-1, start_BXC.clamp_max(sums_BXL.shape[-1] - 1))
        total_BXC = total_BXC + part_BXC.where(wanted_BX1, 0)
        start_BXC = start_BXC + span * wanted_BX1
        sums_BXL = sums_BXL[..., :-span] + sums_BXL[..., span:]
    return total_BXC / kernel_BX[..., None]

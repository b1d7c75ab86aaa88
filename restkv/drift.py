"""How far attention has moved along a text while the observed queries were made: what ReST-KV's adaptive window follows.

Letters: B batch rows, H query heads, C entries of one head (columns), W observed queries, T entries ranked highest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restkv.observe import Observation, Rows
from restkv.select import largest, nth_largest


class Drift:
    """Mean place of the entries the older half of the queries attends to most, minus the newer half's.

    Places are counted in entries, like the kernel and the shift made from them. The released code counts cache
    columns, which at prefill are positions. In a cache thinned out by earlier evictions a shift of one entry spans
    many positions: a drift in positions would carry scores hundreds of tokens too far.

    Args:
        kept_B, max_count: entries that count for each query of a row, and the most of them; None: `max_count` in every row.
        kind: "released": each query ranks all columns, its own window's included; "symmetric": past entries only.
    """

    def __init__(self, obs: Observation, order_BHC: Tensor, kept_B: Tensor | None, max_count: int, kind: str) -> None:
        self._obs, self._kept_B, self._max_count = obs, kept_B, min(max_count, obs.pos.shape[-1])
        self._past_BHC = obs.past if kind == "symmetric" else None
        place_C = torch.arange(order_BHC.shape[-1], dtype=torch.int32, device=order_BHC.device)
        self._place_BHC = torch.empty_like(order_BHC, dtype=torch.int32)
        self._place_BHC.scatter_(-1, order_BHC, place_C.expand_as(order_BHC))
        self._total_BHW = torch.zeros(obs.q.shape[:3], dtype=torch.long, device=obs.q.device)
        self._count_BHW = torch.zeros_like(self._total_BHW)

    def add(self, rows: Rows) -> None:
        """Rank what these queries see. Logits rank like the softmax, and do not underflow into ties."""
        logits_BHWC = rows.logits_BHWC
        if self._past_BHC is not None:
            logits_BHWC = logits_BHWC.masked_fill(~self._past_BHC[:, rows.heads, None], -torch.inf)
        where = slice(None), rows.heads, rows.queries
        place_BHC, columns = self._place_BHC[:, rows.heads], logits_BHWC.shape[-1]
        # Integers: exact in any order.
        if self._kept_B is None and columns < 4 * self._max_count:
            # Where several share the last place all of them count.
            counts_BHWC = (logits_BHWC >= nth_largest(logits_BHWC, self._max_count)) & (logits_BHWC > -torch.inf)
            # Whole numbers up to C^2 / 2, which this dtype holds; sums of integers are several times slower.
            exact = torch.float32 if columns * columns < 1 << 25 else torch.float64
            place_BH1C = place_BHC[:, :, None].to(exact)
            self._total_BHW[where] = place_BH1C.where(counts_BHWC, 0).sum(-1).long()
            self._count_BHW[where] = counts_BHWC.to(exact).sum(-1).long()
            return
        ranked = self._kept_B is not None  # else all that are found count, in whatever order
        if ranked:
            column_BHWT = logits_BHWC.topk(self._max_count).indices
        elif self._past_BHC is None:
            column_BHWT = rows.largest_BHWT(self._max_count)
        else:
            column_BHWT = largest(logits_BHWC, self._max_count)
        counts_BHWT = logits_BHWC.gather(-1, column_BHWT) > -torch.inf
        if self._kept_B is not None:
            rank_T = torch.arange(self._max_count, device=logits_BHWC.device)
            counts_BHWT = counts_BHWT & (rank_T < self._kept_B[:, None, None, None])
        place_BHWT = place_BHC.gather(-1, column_BHWT.flatten(2)).view_as(column_BHWT)
        self._total_BHW[where] = (place_BHWT * counts_BHWT).sum(-1)
        self._count_BHW[where] = counts_BHWT.sum(-1)

    def mean(self) -> Tensor:
        """[B, H] float64; NaN where a half has no query or sees no entry."""
        seen_BW = self._obs.q_pos >= 0
        front_BW = seen_BW & (seen_BW.cumsum(-1) <= seen_BW.sum(-1, keepdim=True) // 2)
        front_BH, rear_BH = (
            (self._total_BHW * half_BW[:, None]).sum(-1) / (self._count_BHW * half_BW[:, None]).sum(-1).double()
            for half_BW in (front_BW, seen_BW & ~front_BW)
        )
        return front_BH - rear_BH

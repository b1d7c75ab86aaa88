"""Block-sparse attention of a prompt over its own keys: every block of queries attends to the blocks of keys listed for it.

Letters: L prompt length, M = ceil(L / size) blocks of it, T rows of a chunk, R blocks of a chunk, H query heads, K KV heads, D
head dim, C columns (key positions) of one block of queries.

Which blocks are worth it is decided elsewhere. Two backends answer the same question: "flex" (compiled, one graph for all prompt
lengths) and "sdpa", which gathers the listed keys of one head and one block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.attention import masked_attention
from modeling.masks import visible


def reachable(blocks: int, size: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [M, M]: blocks of keys of which some query of a block sees some key, by causality and the sliding window.

    With size 4 and window 3, query block 2 (positions 8 ... 11) sees the keys 6 ... 11: blocks 1 and 2.
    """
    row_M1, column_M = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)
    reached = column_M <= row_M1
    return reached if window is None else reached & ((column_M + 1) * size > row_M1 * size - window + 1)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The blocks of keys that each query head's blocks of queries attend to. Within them causality and window hold.

    Attributes:
        listed_HMM: bool, query head x block of queries x block of keys; none that is not `reachable`, and the diagonal always,
            so that every query sees at least itself.
        size: tokens per block; divides modeling.flex.SPARSE_ROWS.
    """

    listed_HMM: Tensor
    size: int

    def share(self, window: int | None) -> Tensor:
        """Scalar float: listed blocks over those that dense attention computes."""
        heads, blocks, _ = self.listed_HMM.shape
        dense = reachable(blocks, self.size, window, self.listed_HMM.device).sum()
        return self.listed_HMM.sum() / (heads * dense)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Head, queries (positions) and their columns [C], oldest first, for all blocks of the queries start ... stop - 1.

        start is a multiple of size.
        """
        offset = torch.arange(self.size, device=self.listed_HMM.device)
        for first in range(start, stop, self.size):
            last = min(first + self.size, stop)
            for head, listed_M in enumerate(self.listed_HMM[:, first // self.size]):
                column_C = (listed_M.nonzero() * self.size + offset).flatten()  # sync: the eager twin needs its shapes
                # Only the newest block, the diagonal, may reach beyond the queries.
                yield head, slice(first, last), column_C[: len(column_C) - self.size + last - first]


def sparse_attention(
    q_THD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
    start: int,
    chosen: BlockMap,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    backend: str,
) -> Tensor:
    """Attention of the prompt's tokens start ... start + T - 1 over the keys that are listed for them.

    Args:
        q_THD: queries after RoPE; start is a multiple of chosen.size.
        k_KLD, v_KLD: keys and values of the whole prompt, contiguous; column c is position c.
        backend: "flex" (compiled on first use, and again for another H, K, D, dtype, device, size, scale or softcap, but not for
            another L, start, window or listing) or "sdpa".
    Returns:
        [T, H, D]
    """
    assert start % chosen.size == 0
    if backend == "flex":
        from modeling.flex import (
            sparse_flex,
        )  # brings the compiler, seconds of imports that the eager twin does not need

        return sparse_flex(q_THD, k_KLD, v_KLD, start, chosen.listed_HMM, chosen.size, scale, softcap, window)
    group = q_THD.shape[1] // len(k_KLD)
    out_THD = torch.empty_like(q_THD)
    for head, rows, column_C in chosen.rows(start, start + len(q_THD)):
        mine = slice(rows.start - start, rows.stop - start)
        q_1TD = q_THD[None, mine, head]
        k_1CD, v_1CD = (t[None, head // group].index_select(1, column_C) for t in (k_KLD, v_KLD))
        seen_1TC = _seen(rows, column_C, window)[None]
        if softcap is None:  # every query sees itself: none needs masked_attention's care for those that see nothing
            out_11TD = F.scaled_dot_product_attention(
                q_1TD[None], k_1CD[None], v_1CD[None], attn_mask=seen_1TC[None], scale=scale
            )
            out_THD[mine, head] = out_11TD[0, 0]
        else:
            out_THD[mine, head] = masked_attention(q_1TD, k_1CD, v_1CD, seen_1TC, scale, softcap)[0]
    return out_THD


def _seen(rows: slice, column_C: Tensor, window: int | None) -> Tensor:
    """Bool [T, C] for one block of queries, whose own positions are the last columns."""
    position_T = torch.arange(rows.start, rows.stop, device=column_C.device)
    if window is not None:
        return visible(column_C, position_T[:, None], window)
    # Without a window only the diagonal block hides anything: comparing all positions would cost a third of the attention.
    T = len(position_T)
    seen_TC = torch.ones(T, len(column_C), dtype=torch.bool, device=column_C.device)
    seen_TC[:, -T:].tril_()
    return seen_TC

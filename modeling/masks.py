"""Masks: every question about who may see whom is a question to `pos`.

Letters: B batch rows, K KV heads, G query heads per KV head, T new tokens, R = B*K page lists, P pages of the pool, S slots,
C entries (columns) of one head.

An entry at position p is visible to a query at position q if p is a position at all (0 <= p: neither empty nor evicted), it is
not in the query's future (p <= q), and the layer's sliding window still reaches it (p > q - window).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from modeling.pages import LayerView

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visible(pos: Tensor, q_pos: Tensor, window: int | Tensor | None) -> Tensor:
    """Bool, broadcast over pos and q_pos (integers): may the query see the entry?"""
    seen = (pos >= 0) & (pos <= q_pos)
    return seen if window is None else seen & (pos > q_pos - window)


def paged_mask_mod(view: LayerView, q_pos_BT: Tensor, heads: int) -> MaskMod:
    """mask_mod over folded queries (row g*T + t of list b*K + k) and physical slots.

    With B = 2, K = 4, T = 3: list 6 is row 1, head 2; query row 7 is group member 2, token 1.
    """
    T = q_pos_BT.shape[1]
    pos_S, keep_SG, reach = view.pos, view.keep, view.reach

    def paged(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
        seen = visible(pos_S[slot], q_pos_BT[h // heads, q % T], None if reach is None else reach[0])
        return seen if keep_SG is None else seen & keep_SG[slot, q // T]

    return paged


def page_block_mask(view: LayerView, num_pages_R: Tensor, mask_mod: MaskMod, query_rows: int) -> BlockMask:
    """The page lists as a FlexAttention block list: list r attends to its first num_pages_R[r] pages.

    Args:
        num_pages_R: int32 [R].
        query_rows: G * T, rows of the folded query.
    """
    lists, num_pages = view.table.shape
    slots = view.pos.shape[0]
    return BlockMask.from_kv_blocks(
        num_pages_R.view(1, lists, 1),
        view.table.view(1, lists, 1, num_pages),
        BLOCK_SIZE=(-(-query_rows // 128) * 128, slots // num_pages),
        mask_mod=mask_mod,
        seq_lengths=(query_rows, slots),
        compute_q_blocks=False,
    )

"""What FlexAttention computes. A module of its own, imported at its first use: it loads the compiler, which takes seconds.

Letters: B batch rows, H query heads, K KV heads, G = H / K, T new tokens, D head dim, R = B*K page lists (of paged attention) or
blocks of queries (of sparse attention), P pages of the pool, S slots, L prompt length, M blocks of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modeling.compiled import compiled, not_compiled, only_compiled, teach_inductor
from modeling.masks import visible
from modeling.pages import LayerView

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
teach_inductor()  # before any graph that this module is traced into is lowered
SPARSE_ROWS = 1024  # queries of one compiled call of sparse attention; a chunk is padded to a multiple of it


def _logits(softcap: float | None, bias_S: Tensor | None = None) -> ScoreMod | None:
    """Attention logits under a soft cap (Gemma 2) and with what is added to those of each slot, if there is any of it."""
    if softcap is None and bias_S is None:
        return None

    def logits(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias_S is None else score + bias_S[kv]

    return logits


# -- over pages


def paged_flex(
    q_1RqD: Tensor, view: LayerView, q_pos_BT: Tensor, heads: int, scale: float, softcap: float | None
) -> Tensor:
    """paged_attention over folded queries [1, R, G*T, D]; only under torch.compile: eager flex ignores block lists.

    Raises:
        CompileError: called outside of it.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise not_compiled()
    _, lists, query_rows, head_dim = q_1RqD.shape
    slots = view.pos.shape[0]
    page = slots // view.table.shape[1]
    # Zeroing padding gives the folded queries a 4-D buffer of their own: the CPU lowering looks at the buffer behind a view,
    # and fails on, or misreads, one of another shape (docs/flexattention.md §1, bugs 1 and 2).
    group = query_rows // q_pos_BT.shape[1]
    padding_1Rq1 = repeat(q_pos_BT < 0, "B T -> 1 (B K) (G T) 1", K=heads, G=group)
    q_1RqD = q_1RqD.masked_fill(padding_1Rq1, 0)
    pages_R = (view.used + (page - 1)) // page - view.skipped
    mask = page_block_mask(view, pages_R, paged_mask_mod(view, q_pos_BT, heads), query_rows)

    # A partition that is no multiple of the page keeps CPU lowering off its decode template, which reads wrong buffers for
    # folded queries, fails without full blocks and overflows for logits below -88 (docs/flexattention.md §1, bugs 2 to 4).
    # On CUDA no tile may be longer than the page it reads, and only the template for few queries sees to that by itself.
    options: Any = {"BLOCK_N": page} if page < 128 else {}
    if q_1RqD.device.type == "cpu":
        options = {"PARTITION_SIZE": page - 1}
    return flex_attention(
        q_1RqD,
        view.k.expand(1, lists, slots, head_dim),  # stride 0: every list reads the same pool
        view.v.expand(1, lists, slots, head_dim),
        score_mod=_logits(softcap, view.bias),
        block_mask=mask,
        scale=scale,
        kernel_options=options,
    )


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
    """The page lists as a FlexAttention block list: list r attends to the first num_pages_R[r] pages that are `listed`.

    Args:
        num_pages_R: int32 [R].
        query_rows: G * T, rows of the folded query.
    """
    lists, num_pages = view.table.shape
    slots = view.pos.shape[0]
    return BlockMask.from_kv_blocks(
        num_pages_R.view(1, lists, 1),
        view.listed.view(1, lists, 1, num_pages),
        BLOCK_SIZE=(-(-query_rows // 128) * 128, slots // num_pages),
        mask_mod=mask_mod,
        seq_lengths=(query_rows, slots),
        compute_q_blocks=False,
    )


# -- over a prompt, by blocks


def sparse_flex(
    q_THD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
    start: int,
    listed_HMM: Tensor,
    size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """sparse_attention's compiled twin; `listed_HMM` and `size` are those of its BlockMap.

    Raises:
        CompileError: it cannot be compiled; nothing has been computed.
    """
    T, H, D = q_THD.shape
    blocks, device = listed_HMM.shape[-1], q_THD.device
    rows = -(-T // SPARSE_ROWS) * SPARSE_ROWS
    q_1HTD = q_THD.new_zeros(1, H, rows, D)
    q_1HTD[0, :, :T] = q_THD.transpose(0, 1)
    listed_HRM = torch.zeros(H, rows // size, blocks, dtype=torch.bool, device=device)
    here = listed_HMM[:, start // size : -(-(start + T) // size)]
    listed_HRM[:, : here.shape[1]] = here
    partial_RM = _partial(start // size, rows // size, blocks, size, window, device)
    k_1KLD, v_1KLD = k_KLD[None], v_KLD[None]
    some, every = _lists(listed_HRM & partial_RM), _lists(listed_HRM & ~partial_RM)
    for tensor in (k_1KLD, v_1KLD):
        torch._dynamo.mark_dynamic(tensor, 2)
    for _, index_1HRM in (some, every):
        torch._dynamo.mark_dynamic(index_1HRM, 3)
    bounds_2 = torch.tensor([start, blocks * size if window is None else window], device=device)
    out_1HTD = _compiled(q_1HTD, k_1KLD, v_1KLD, *some, *every, bounds_2, size, scale, softcap)
    return out_1HTD[0, :, :T].transpose(0, 1)


def _partial(first: int, rows: int, blocks: int, size: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [R, M]: blocks that need a look at every position, those on the diagonal and on the edge of the window."""
    row_R1, column_M = torch.arange(first, first + rows, device=device)[:, None], torch.arange(blocks, device=device)
    partial = column_M == row_R1
    return partial if window is None else partial | (column_M * size <= (row_R1 + 1) * size - 1 - window)


def _lists(listed_HRM: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, H, R] and indices [1, H, R, M] int32 of the listed blocks, those that count first."""
    index_HRM = (~listed_HRM).to(torch.int8).argsort(dim=-1, stable=True)
    return listed_HRM.sum(-1, dtype=torch.int32)[None], index_HRM.to(torch.int32)[None]


def _block_flex(
    q_1HTD: Tensor,
    k_1KLD: Tensor,
    v_1KLD: Tensor,
    some_1HR: Tensor,
    some_1HRM: Tensor,
    every_1HR: Tensor,
    every_1HRM: Tensor,
    bounds_2: Tensor,
    size: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """What is compiled: blocks to be masked position by position, and blocks to be read as they are.

    Args:
        bounds_2: first query's position and window; tensors, or every chunk would compile anew.
    """
    bounds_2 = only_compiled(bounds_2)

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= bounds_2[0] + q) & (kv > bounds_2[0] + q - bounds_2[1])

    mask = BlockMask.from_kv_blocks(
        some_1HR,
        some_1HRM,
        every_1HR,
        every_1HRM,
        BLOCK_SIZE=(size, size),
        mask_mod=causal,
        seq_lengths=(q_1HTD.shape[2], k_1KLD.shape[2]),
        compute_q_blocks=False,
    )
    # A Triton tile may not be larger than the blocks it reads.
    tiles: Any = {"BLOCK_M": size, "BLOCK_N": size} if q_1HTD.device.type == "cuda" and size < 128 else {}
    return flex_attention(
        q_1HTD,
        k_1KLD,
        v_1KLD,
        score_mod=_logits(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=tiles,
    )


# K and V keep their length dynamic (mark_dynamic): right where they are whole inputs of the graph (docs/flexattention.md §3).
_compiled = compiled(_block_flex)

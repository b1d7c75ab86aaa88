"""The two ways through a decoder: one layer over a whole prompt (and over what is read beside it), and all layers over a few new
tokens.

Letters: B batch rows, T new tokens, L prompt length, H query heads, K KV heads, D head dim, E hidden width, W remembered queries,
R = B*K page lists, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling.attention import causal_attention, paged_attention
from modeling.cache import KVCache
from modeling.compiled import only_compiled
from modeling.layers import Block, Decoder
from modeling.pages import LayerView
from modeling.pool import SINK_PAGE
from modeling.rope import rotate
from modeling.sparse import BlockMap, sparse_attention

Watch = Callable[[Tensor, Tensor, int, BlockMap | None], None]
"""Called with q [T, H, D], k [K, C, D] of all columns so far, the first row's position, what the rows attend to (None: all)."""
Choose = Callable[[Tensor, Tensor], BlockMap]
"""Which blocks to attend to, from q [H, L, D] and k [K, L, D] of the prompt, after RoPE."""
Attend = Callable[..., Tensor]
"""sparse_attention with a backend."""

CHUNK = 1024  # prompt rows at a time: bounds the projections' and the MLP's temporary memory


def dense_layer(
    model: Decoder,
    block: Block,
    x_LE: Tensor,
    rotary: list[tuple[Tensor, Tensor]],
    last: int,
    *,
    watch: Watch | None = None,
    raw: bool = False,
    choose: Choose | None = None,
    attend: Attend = partial(sparse_attention, backend="sdpa"),  # noqa: B008 - it is no more mutable than a function
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run one layer over a whole prompt with causal attention, all of it or some blocks; x_LE is updated in place.

    Dense attention needs the keys up to a chunk's rows and follows chunk by chunk. A choice of blocks needs all queries and keys
    first, so that with `choose` the queries are held too: as much as one hidden state.

    Args:
        rotary: model.rotary of positions 0 ... L-1, entries [1, L, D].
        last: W, how many of the last queries to return.
        watch: called for every chunk of rows, in order, before its attention is computed.
        raw: return the keys before RoPE too.
        choose: which blocks are attended to; None is dense attention.
        attend: to the blocks chosen.
        chunk: rows at a time; a multiple of the blocks' size.
    Returns:
        q [H, W, D] (min(W, L) of them), k and v [K, L, D], all after RoPE, and the unrotated keys [K, L, D] or None.
    """
    config = model.config
    length = len(x_LE)
    cos_1LD, sin_1LD = rotary[block.rope]
    k_KLD = x_LE.new_empty(config.num_kv_heads, length, config.head_dim)
    v_KLD = torch.empty_like(k_KLD)
    raw_KLD = torch.empty_like(k_KLD) if raw else None
    q_LHD = None if choose is None else x_LE.new_empty(length, config.num_heads, config.head_dim)
    q_WHD = x_LE.new_empty(min(last, length), config.num_heads, config.head_dim)
    first_kept = length - len(q_WHD)
    attention: dict[str, Any] = {"scale": config.attn_scale, "softcap": config.attn_softcap, "window": block.window}

    def finish(q_THD: Tensor, rows: slice, chosen: BlockMap | None) -> None:
        if watch is not None:
            watch(q_THD, k_KLD[:, : rows.stop], rows.start, chosen)
        if chosen is None:
            o_THD = causal_attention(q_THD, k_KLD, v_KLD, rows.start, **attention)
        else:
            o_THD = attend(q_THD, k_KLD, v_KLD, rows.start, chosen, **attention)
        x_LE[rows] = block.finish(x_LE[None, rows], o_THD[None])[0]

    pieces = [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    for rows in pieces:
        q_1THD, k_1TKD, v_1TKD = block.unrotated(x_LE[None, rows])
        if raw_KLD is not None:
            raw_KLD[:, rows] = k_1TKD[0].transpose(0, 1)
        q_1THD, k_1TKD = (rotate(t, cos_1LD[:, rows], sin_1LD[:, rows]) for t in (q_1THD, k_1TKD))
        k_KLD[:, rows], v_KLD[:, rows] = k_1TKD[0].transpose(0, 1), v_1TKD[0].transpose(0, 1)
        if rows.stop > first_kept:
            fresh = max(rows.start, first_kept)
            q_WHD[fresh - first_kept : rows.stop - first_kept] = q_1THD[0, fresh - rows.start :]
        if q_LHD is None:
            finish(q_1THD[0], rows, None)
        else:
            q_LHD[rows] = q_1THD[0]
    if choose is not None and q_LHD is not None:
        chosen = choose(q_LHD.transpose(0, 1), k_KLD)
        for rows in pieces:
            finish(q_LHD[rows], rows, chosen)
    return q_WHD.transpose(0, 1), k_KLD, v_KLD, raw_KLD


def side_layer(
    model: Decoder,
    block: Block,
    x_TE: Tensor,
    rotary: list[tuple[Tensor, Tensor]],
    k_KLD: Tensor,
    v_KLD: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer over text that goes on after a prompt: what dense_layer computes of it there; x_TE is updated in place.

    Args:
        rotary: model.rotary of positions L ... L+T-1, entries [1, T, D].
        k_KLD, v_KLD: the layer's keys and values of the prompt, or of whatever stands before.
        chunk: rows at a time.
    Returns:
        q [H, T, D], and the text's own k and v [K, T, D], all after RoPE.
    """
    config, before = model.config, k_KLD.shape[1]
    cos_1TD, sin_1TD = rotary[block.rope]
    room_KTD = x_TE.new_empty(len(k_KLD), len(x_TE), config.head_dim)
    k_KCD, v_KCD = torch.cat([k_KLD, room_KTD], 1), torch.cat([v_KLD, room_KTD], 1)
    q_THD = x_TE.new_empty(len(x_TE), config.num_heads, config.head_dim)
    attention: dict[str, Any] = {"scale": config.attn_scale, "softcap": config.attn_softcap, "window": block.window}
    for start in range(0, len(x_TE), chunk):
        rows = slice(start, min(start + chunk, len(x_TE)))
        q_1tHD, k_1tKD, v_1tKD = block.project(x_TE[None, rows], cos_1TD[:, rows], sin_1TD[:, rows])
        at = slice(before + rows.start, before + rows.stop)
        q_THD[rows], k_KCD[:, at], v_KCD[:, at] = q_1tHD[0], k_1tKD[0].transpose(0, 1), v_1tKD[0].transpose(0, 1)
        o_tHD = causal_attention(q_THD[rows], k_KCD, v_KCD, at.start, **attention)
        x_TE[rows] = block.finish(x_TE[None, rows], o_tHD[None])[0]
    # Copies: parts of the whole would keep the prompt's entries alive once more for every text that is read.
    return q_THD.transpose(0, 1), k_KCD[:, before:].clone(), v_KCD[:, before:].clone()


def step(
    model: Decoder,
    ids_BT: Tensor,
    pos_BT: Tensor,
    lag_B: Tensor,
    views: list[LayerView],
    queries: list[Tensor],
    ring_size: int,
    backend: str,
) -> Tensor:
    """Run T new tokens per row through all layers over the paged cache, writing their keys and values into it.

    Args:
        ids_BT, pos_BT: int64 token ids and int32 positions; pos -1 marks padding (trailing) and finished rows.
        lag_B: int32, what to subtract from positions before RoPE (KVCache.lag).
        views: one per layer; their lists must have room for the new tokens (KVCache.reserve).
        queries: one ring buffer [B*(W+1), H, D] per layer, or none.
        ring_size: W, queries that a ring holds per row; 0 without rings.
    Returns:
        hidden states [B, T, E] after the last layer (model.head makes logits of them).
    Raises:
        CompileError: backend "flex" in anything but a compiled graph; the cache is as it was.
    """
    if backend == "flex":
        ids_BT = only_compiled(ids_BT)
    x_BTE = model.embed(ids_BT)
    rope_BT = pos_BT - lag_B[:, None]
    rotary = model.rotary(rope_BT, rope_BT.amax(-1) + 1)
    # Whether there is padding is known at once on a CPU; elsewhere asking would wait for the device.
    padded = backend == "flex" or pos_BT.device.type != "cpu" or bool((pos_BT < 0).any())  # no sync: a CPU
    run = _compiled_layer_step if backend == "flex" else layer_step
    rings: list[Tensor | None] = [*queries] or [None] * len(views)
    for block, view, ring in zip(model.blocks, views, rings, strict=True):
        cos_BTD, sin_BTD = rotary[block.rope]
        x_BTE = run(model, block, x_BTE, cos_BTD, sin_BTD, pos_BT, padded, view, ring, ring_size, backend)
    return x_BTE


def layer_step(
    model: Decoder,
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    pos_BT: Tensor,
    padded: bool,
    view: LayerView,
    ring: Tensor | None,
    ring_size: int,
    backend: str,
) -> Tensor:
    """One layer of `step`: project, write to the pages, attend through them, finish."""
    q_BTHD, raw_BTKD, v_BTKD = block.unrotated(x_BTE)
    q_BTHD, k_BTKD = rotate(q_BTHD, cos_BTD, sin_BTD), rotate(raw_BTKD, cos_BTD, sin_BTD)
    _write(view, k_BTKD, v_BTKD, raw_BTKD, pos_BT, padded)
    if ring is not None:
        _remember(ring, q_BTHD, pos_BT, ring_size)
    config = model.config
    o_BTHD = paged_attention(
        q_BTHD,
        view,
        pos_BT,
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        backend=backend,
    )
    return block.finish(x_BTE, o_BTHD)


# One traced region for all layers of a kind: compile time grows with the kinds, not with the depth (docs/flexattention.md §4).
_compiled_layer_step = torch.compiler.nested_compile_region(layer_step)


def _write(view: LayerView, k_BTKD: Tensor, v_BTKD: Tensor, raw_BTKD: Tensor, pos_BT: Tensor, padded: bool) -> None:
    """Append the new tokens to their rows' lists; padding writes zeros to the page that belongs to nobody.

    Zeros, since that page is read, though under a mask: a NaN of a finished row would reach all others as 0 times NaN.
    Only index_copy_ on the 4-D pool stays in place in a compiled graph: an indexed assignment copies the pool
    (docs/flexattention.md §7).
    """
    B, T, K, D = k_BTKD.shape
    lists, num_pages = view.table.shape
    page = view.pos.shape[0] // num_pages
    pos_RT = pos_BT[:, None, :].expand(B, K, T).reshape(lists, T)
    entry_RT = view.used[:, None] + torch.arange(T, device=pos_BT.device, dtype=torch.int32)
    # Room is reserved for real tokens only: padding may point beyond the list, and in a small pool beyond the table.
    number_RT = view.table.gather(1, (entry_RT // page).clamp(max=num_pages - 1).long())
    slot_RT = number_RT * page + entry_RT % page
    if padded:
        slot_RT = torch.where(pos_RT >= 0, slot_RT, SINK_PAGE)
    slot_n = slot_RT.long().reshape(-1)

    def rows(x_BTKD: Tensor) -> Tensor:
        x_BTKD = x_BTKD.masked_fill((pos_BT < 0)[..., None, None], 0) if padded else x_BTKD
        return x_BTKD.transpose(1, 2).reshape(lists * T, D)

    view.k.index_copy_(2, slot_n, rows(k_BTKD)[None, None])
    view.v.index_copy_(2, slot_n, rows(v_BTKD)[None, None])
    view.pos.index_copy_(0, slot_n, pos_RT.reshape(-1))  # EMPTY for padding
    if view.raw is not None:
        view.raw.index_copy_(0, slot_n, rows(raw_BTKD))
    if view.keep is not None:
        view.keep.index_copy_(
            0, slot_n, torch.ones_like(slot_n, dtype=torch.bool)[:, None].expand(-1, view.keep.shape[1])
        )
    view.used.add_((pos_RT >= 0).sum(-1, dtype=torch.int32) if padded else T)


def _remember(ring: Tensor, q_BTHD: Tensor, pos_BT: Tensor, ring_size: int) -> None:
    """Write the last W of the new queries to the ring; older ones would fight over the same slots.

    Those, and padding, go to the row's last slot as zeros.
    """
    B, T, H, D = q_BTHD.shape
    row_B1 = torch.arange(B, device=pos_BT.device)[:, None]
    recent_BT = (pos_BT >= 0) & (pos_BT > pos_BT.amax(-1, keepdim=True) - ring_size)
    slot_BT = row_B1 * (ring_size + 1) + torch.where(recent_BT, pos_BT % ring_size, ring_size)
    q_BTHD = q_BTHD.masked_fill(~recent_BT[..., None, None], 0)
    ring.index_copy_(0, slot_BT.reshape(-1).long(), q_BTHD.reshape(B * T, H, D))


def extend(model: Decoder, cache: KVCache, ids_BT: Tensor, pos_BT: Tensor, backend: str = "sdpa") -> Tensor:
    """`step` on a KVCache, eagerly: reserve, run, advance. Returns hidden states [B, T, E]."""
    cache.reserve(ids_BT.shape[1])
    x_BTE = step(model, ids_BT, pos_BT, cache.lag, cache.views(), cache.queries, cache.ring_size, backend)
    cache.next_pos.copy_(torch.maximum(cache.next_pos, pos_BT.amax(-1) + 1))
    return x_BTE

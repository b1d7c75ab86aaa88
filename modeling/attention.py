"""Attention: of a few new tokens over pages (flex compiled, or SDPA eager), and of a whole prompt over its own keys.

Letters: B batch rows, H query heads, K KV heads, G = H / K, T new tokens, D head dim, R = B*K page lists, S slots of the pool,
C columns (entries of one head), L tokens of a prompt, N columns of a text that goes on from it.

The query group is folded into query rows (q [1, R, G*T, D]), so a KV head is read once for its whole group and no kernel needs
to know about grouped-query attention. Both backends answer the same question; sdpa is the slow, eager twin of flex.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from modeling.masks import visible
from modeling.pages import LayerView
from modeling.pool import read

CAPPED_LOGITS = 1 << 22  # soft-capped logits are written out, so many at a time (16 MiB as float32)
# Pairs of query and key whose mask is written out at a time: 40 MiB, as booleans and as the floats SDPA makes of them. It takes
# at least 256 queries for SDPA's fastest tiles (128 cost half as much again), whose masks are smaller than most hidden states.
MASKED_PAIRS, MASKED_QUERIES = 1 << 23, 256


def paged_attention(
    q_BTHD: Tensor,
    view: LayerView,
    q_pos_BT: Tensor,
    *,
    scale: float,
    softcap: float | None,
    backend: str,
) -> Tensor:
    """Attention of new tokens (already written to the pages) over everything their rows' lists hold.

    Args:
        q_BTHD: queries after RoPE.
        view: the layer's pool and page lists, `used` counting the new tokens.
        q_pos_BT: int32 positions; -1 marks padding, whose output is arbitrary but finite.
        backend: "flex" (only under torch.compile: eager flex ignores block lists) or "sdpa".
    Returns:
        [B, T, H, D]
    """
    B, T = q_BTHD.shape[:2]
    K = len(view.used) // B
    folded_1RqD = rearrange(q_BTHD, "B T (K G) D -> 1 (B K) (G T) D", K=K)
    if backend == "flex":
        from modeling.flex import (
            paged_flex,
        )  # brings the compiler, seconds of imports that the eager twin does not need

        out_1RqD = paged_flex(folded_1RqD, view, q_pos_BT, K, scale, softcap)
    else:
        out_1RqD = _gathered(folded_1RqD, view, q_pos_BT, K, scale, softcap)
    return rearrange(out_1RqD, "1 (B K) (G T) D -> B T (K G) D", K=K, T=T)


def _gathered(
    q_1RqD: Tensor, view: LayerView, q_pos_BT: Tensor, heads: int, scale: float, softcap: float | None
) -> Tensor:
    lists, num_pages = view.table.shape
    page = view.pos.shape[0] // num_pages
    T = q_pos_BT.shape[1]
    longest = int(view.used.max())  # sync: the eager twin pads to the longest list
    column_C = torch.arange(longest, device=view.pos.device)
    slot_RC = view.table[:, column_C // page].long() * page + column_C % page
    slot_RC = slot_RC.masked_fill(column_C >= view.used[:, None], 0)  # slot 0 is on the page nobody may read
    q_pos_R1T1 = q_pos_BT.repeat_interleave(heads, 0)[:, None, :, None]
    seen_RGTC = visible(read(view.pos, slot_RC)[:, None, None, :], q_pos_R1T1, view.reach)
    group = q_1RqD.shape[2] // T
    if view.keep is None:
        seen_RGTC = seen_RGTC.expand(lists, group, T, longest)
    else:
        seen_RGTC = seen_RGTC & read(view.keep, slot_RC).transpose(1, 2)[:, :, None, :]
    seen_RqC = seen_RGTC.reshape(lists, group * T, longest)
    k_RCD, v_RCD = read(view.k[0, 0], slot_RC), read(view.v[0, 0], slot_RC)
    bias_R1C = None if view.bias is None else read(view.bias, slot_RC)[:, None]
    return masked_attention(q_1RqD[0], k_RCD, v_RCD, seen_RqC, scale, softcap, bias_R1C)[None]


def masked_attention(
    q_XTD: Tensor,
    k_XCD: Tensor,
    v_XCD: Tensor,
    seen_XTC: Tensor,
    scale: float,
    softcap: float | None,
    bias_X1C: Tensor | None = None,
) -> Tensor:
    """Plain attention with a bool mask (broadcast over X); a query that sees nothing returns zeros.

    Without a soft cap and biases this is SDPA; else the logits are formed in float32 at least: no fused CPU kernel caps them, and
    one that takes biases rounds them to the queries' dtype.

    Args:
        bias_X1C: float32, added to the logits of every query, after the cap.
    """
    if softcap is None and bias_X1C is None:
        blind = ~seen_XTC.any(-1, keepdim=True)  # a softmax over nothing is NaN; let such rows see all, then zero them
        # With four dimensions, the mask's included, no kernel writes the logits out: a tenth of the memory, twice as fast.
        mask_1XTC = (seen_XTC | blind)[(None,) * (4 - seen_XTC.ndim)]
        out_1XTD = F.scaled_dot_product_attention(
            q_XTD[None], k_XCD[None], v_XCD[None], attn_mask=mask_1XTC, scale=scale
        )
        return out_1XTD[0].masked_fill(blind, 0)
    parts = []
    for q_XtD, seen_XtC in zip(q_XTD.split(_rows(k_XCD), -2), seen_XTC.split(_rows(k_XCD), -2), strict=True):
        logits_XtC = torch.matmul(q_XtD, k_XCD.transpose(-1, -2))
        logits_XtC = logits_XtC.to(torch.promote_types(logits_XtC.dtype, torch.float32)) * scale
        if softcap is not None:
            logits_XtC = softcap * torch.tanh(logits_XtC / softcap)
        if bias_X1C is not None:
            logits_XtC = logits_XtC + bias_X1C
        weights_XtC = torch.softmax(logits_XtC.masked_fill(~seen_XtC, float("-inf")), dim=-1).nan_to_num(0.0)
        parts.append(torch.matmul(weights_XtC.to(v_XCD.dtype), v_XCD))
    return torch.cat(parts, -2)


def branched_attention(
    q_BTHD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
    own_k_KBND: Tensor,
    own_v_KBND: Tensor,
    first_B: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention of several texts that go on from one prompt, each over the prompt's entries and its own: the prompt's are read
    once for all of them, and not copied.

    Args:
        q_BTHD: T new queries of every text, after RoPE.
        k_KLD, v_KLD: the prompt's entries; column c is position c.
        own_k_KBND, own_v_KBND: those of the texts, the new ones included; column n is position L + n. All are finite.
        first_B: the column of each text's first new query.
    Returns:
        [B, T, H, D]
    """
    B, T, H, _ = q_BTHD.shape
    per_query = H * (k_KLD.shape[1] + own_k_KBND.shape[2])
    tokens = max(1, min(T, CAPPED_LOGITS // per_query))
    texts = max(1, CAPPED_LOGITS // (per_query * tokens))
    out_BTHD = torch.empty_like(q_BTHD)
    for rows in (slice(start, start + texts) for start in range(0, B, texts)):
        own = own_k_KBND[:, rows], own_v_KBND[:, rows]
        for part in (slice(start, start + tokens) for start in range(0, T, tokens)):
            at_BT = first_B[rows, None] + torch.arange(T, device=q_BTHD.device)[part]
            out_BTHD[rows, part] = _branched(q_BTHD[rows, part], k_KLD, v_KLD, *own, at_BT, scale, softcap, window)
    return out_BTHD


def _branched(
    q_BTHD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
    own_k_KBND: Tensor,
    own_v_KBND: Tensor,
    at_BT: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """branched_attention of so few queries that their logits may be written out; at_BT: their columns."""
    K, L, _ = k_KLD.shape
    B, G = len(q_BTHD), q_BTHD.shape[2] // K
    q_KBqD = rearrange(q_BTHD, "B T (K G) D -> K B (G T) D", K=K)
    of_prompt_KBqL = (q_KBqD.flatten(1, 2) @ k_KLD.mT).unflatten(1, (B, -1))
    logits_KBqC = torch.cat([of_prompt_KBqL, q_KBqD @ own_k_KBND.mT], -1)
    logits_KBqC = logits_KBqC.to(torch.promote_types(logits_KBqC.dtype, torch.float32)) * scale
    if softcap is not None:
        logits_KBqC = softcap * torch.tanh(logits_KBqC / softcap)
    column_C = torch.arange(logits_KBqC.shape[-1], device=q_BTHD.device)
    seen_BTC = visible(column_C, L + at_BT[..., None], window)
    seen_BqC = repeat(seen_BTC, "B T C -> B (G T) C", G=G)
    a_KBqC = logits_KBqC.masked_fill(~seen_BqC, -torch.inf).softmax(-1).to(v_KLD.dtype)
    from_prompt_KBqD = (a_KBqC[..., :L].flatten(1, 2) @ v_KLD).unflatten(1, (B, -1))
    return rearrange(from_prompt_KBqD + a_KBqC[..., L:] @ own_v_KBND, "K B (G T) D -> B T (K G) D", G=G)


def _rows(k_XCD: Tensor) -> int:
    """Queries per head whose logits are written out at a time."""
    return max(1, CAPPED_LOGITS // max(1, k_XCD.shape[0] * k_XCD.shape[1]))


def _past_and_own(q_KGTD: Tensor, k_KGCD: Tensor, v_KGCD: Tensor, start: int, scale: float) -> Tensor:
    """Queries after `start` over all keys before it, and causally over their own, put together by their log-sum-exps.

    Neither part needs a mask, which would cost a CPU a sixth of the time at 64 dimensions per head, and half at 32. The operator
    is the one SDPA takes on a CPU; only by itself does it return the log-sum-exp.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past_KGTD, past_KGT = flash(q_KGTD, k_KGCD[:, :, :start], v_KGCD[:, :, :start], scale=scale)
    own_KGTD, own_KGT = flash(q_KGTD, k_KGCD[:, :, start:], v_KGCD[:, :, start:], is_causal=True, scale=scale)
    share_KGT1 = torch.sigmoid(past_KGT - own_KGT)[..., None]
    return torch.lerp(own_KGTD.to(share_KGT1.dtype), past_KGTD.to(share_KGT1.dtype), share_KGT1).to(q_KGTD.dtype)


def causal_attention(
    q_THD: Tensor,
    k_KCD: Tensor,
    v_KCD: Tensor,
    start: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Dense attention of the prompt's tokens start ... start + T - 1 over its keys 0 ... start + T - 1.

    Args:
        q_THD: queries after RoPE.
        k_KCD, v_KCD: keys and values of at least start + T tokens; column c is position c.
    Returns:
        [T, H, D]
    """
    T, H, _ = q_THD.shape
    K = k_KCD.shape[0]
    G = H // K
    end = start + T
    first = 0 if window is None else max(0, start - window + 1)
    k_KCD, v_KCD = k_KCD[:, first:end], v_KCD[:, first:end]
    if softcap is None and first == start == 0 and (window is None or window >= T):
        out = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None], k_KCD[None], v_KCD[None], is_causal=True, scale=scale, enable_gqa=G > 1
        )
        return out[0].transpose(0, 1)
    column_C = torch.arange(first, end, device=q_THD.device)
    position_T1 = torch.arange(start, end, device=q_THD.device)[:, None]
    q_KGTD = rearrange(q_THD, "T (K G) D -> K G T D", K=K)
    k_KGCD, v_KGCD = (t[:, None].expand(-1, G, -1, -1) for t in (k_KCD, v_KCD))
    if softcap is None and first == 0 and (window is None or window >= end) and q_THD.device.type == "cpu":
        return rearrange(_past_and_own(q_KGTD, k_KGCD, v_KGCD, start, scale), "K G T D -> T (K G) D")
    # A mask for every query head, which soft-capped logits need, is as large as the logits.
    capped_rows = max(1, _rows(k_KCD) // G)
    rows = max(MASKED_QUERIES, MASKED_PAIRS // len(column_C)) if softcap is None else capped_rows
    parts = []
    for q_KGtD, position_t1 in zip(q_KGTD.split(rows, 2), position_T1.split(rows), strict=True):
        seen_tC = visible(column_C, position_t1, window)
        if softcap is None:  # keys are shared by stride, so that the group needs one mask
            mask_11tC = seen_tC[None, None]
            parts.append(F.scaled_dot_product_attention(q_KGtD, k_KGCD, v_KGCD, attn_mask=mask_11tC, scale=scale))
        else:
            q_KqD, seen_qC = rearrange(q_KGtD, "K G t D -> K (G t) D"), repeat(seen_tC, "t C -> (G t) C", G=G)
            out_KqD = masked_attention(q_KqD, k_KCD, v_KCD, seen_qC, scale, softcap)
            parts.append(rearrange(out_KqD, "K (G t) D -> K G t D", G=G))
    return rearrange(torch.cat(parts, 2), "K G T D -> T (K G) D")

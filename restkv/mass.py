"""Attention an entry has collected: what H2O accumulates, without ever holding an L x L matrix.

Letters: H query heads, K KV heads, G = H / K, T queries, t of them at once, C columns, c of them, D head dim, N columns that
one block of queries attends to.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from modeling.masks import visible
from modeling.sparse import BlockMap
from restkv.observe import chunk_elements

FAINT = -80.0  # logits below the largest; e^-80 is 2e-35, and a mass that small decides nothing


def column_mass(
    q_THD: Tensor,
    k_KCD: Tensor,
    start: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    chosen: BlockMap | None = None,
) -> Tensor:
    """Softmax weight every column receives from queries start ... start + T - 1, summed: [H, C] float32.

    Causal; computed in blocks of one KV head's queries and the columns they may see, none larger than chunk_elements.

    Args:
        q_THD, k_KCD: after RoPE; column c is position c, and C = start + T.
        chosen: what the queries attend to, when that is not everything: the weights are those of the sparse attention.
    """
    if chosen is not None:
        return _listed_mass(q_THD, k_KCD, start, chosen, scale, softcap, window)
    (T, H, _), (K, C, _) = q_THD.shape, k_KCD.shape
    G = H // K
    mass_KGC = torch.zeros(K, G, C, device=q_THD.device)
    q_KGTD = rearrange(q_THD, "T (K G) D -> K G T D", K=K)
    quarter = chunk_elements(q_THD.device) // 4  # softmax and sum find so many logits in the cache
    rows = max(1, quarter // (G * C))
    for head in range(K):
        k_DC = k_KCD[head].float().mT
        for first in range(0, T, rows):
            q_GtD = q_KGTD[head, :, first : first + rows].float()
            newest, stop = start + first, start + first + q_GtD.shape[1]
            oldest = 0 if window is None else max(0, newest + 1 - window)
            logits_qc = rearrange(q_GtD, "G t D -> (G t) D") @ k_DC[:, oldest:stop]
            logits_Gtc = rearrange(logits_qc, "(G t) c -> G t c", G=G) * scale
            if softcap is not None:
                logits_Gtc = softcap * torch.tanh(logits_Gtc / softcap)
            position_t1 = torch.arange(newest, stop, device=q_THD.device)[:, None]
            # Without a window only the block's own columns can lie in a query's future.
            unsure = 0 if window is not None else newest
            column_c = torch.arange(oldest + unsure, stop, device=q_THD.device)
            logits_Gtc[..., unsure:].masked_fill_(~visible(column_c, position_t1, window), -torch.inf)
            mass_KGC[head, :, oldest:stop] += _softmax_sum(logits_Gtc)
    return rearrange(mass_KGC, "K G C -> (K G) C")


def _softmax_sum(logits_Xtc: Tensor) -> Tensor:
    """logits.softmax(-1).sum(-2), in place, but for weights below e^FAINT times the largest: they count as that.

    Sharp attention is full of weights that are no normal float32, which take Intel's processors two to four times as long.
    """
    weight_Xtc = logits_Xtc.sub_(logits_Xtc.amax(-1, keepdim=True)).clamp_(min=FAINT).exp_()
    return (weight_Xtc.sum(-1)[..., None, :].reciprocal() @ weight_Xtc)[..., 0, :]


def _listed_mass(
    q_THD: Tensor, k_KCD: Tensor, start: int, chosen: BlockMap, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    T, H, _ = q_THD.shape
    group = H // len(k_KCD)
    mass_HC = torch.zeros(H, k_KCD.shape[1], device=q_THD.device)
    for head, rows, column_N in chosen.rows(start, start + T):
        q_tD = q_THD[rows.start - start : rows.stop - start, head].float()
        logits_tN = q_tD @ k_KCD[head // group, column_N].float().mT * scale
        if softcap is not None:
            logits_tN = softcap * torch.tanh(logits_tN / softcap)
        position_t1 = torch.arange(rows.start, rows.stop, device=q_THD.device)[:, None]
        logits_tN = logits_tN.masked_fill(~visible(column_N, position_t1, window), -torch.inf)
        mass_HC[head, column_N] += _softmax_sum(logits_tN)
    return mass_HC

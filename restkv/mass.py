"""Attention an entry has collected: what H2O accumulates, without ever holding an L x L matrix.

Letters: H query heads, K KV heads, G = H / K, T queries, C columns, D head dim, N columns that one block of queries attends to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.masks import visible
from modeling.sparse import BlockMap
from restkv.observe import chunk_elements


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

    Causal; computed in blocks of queries, so that the largest temporary has chunk_elements numbers.

    Args:
        q_THD, k_KCD: after RoPE; column c is position c, and C = start + T.
        chosen: what the queries attend to, when that is not everything: the weights are those of the sparse attention.
    """
    if chosen is not None:
        return _listed_mass(q_THD, k_KCD, start, chosen, scale, softcap, window)
    T, H, D = q_THD.shape
    K, C, _ = k_KCD.shape
    mass_HC = torch.zeros(H, C, device=q_THD.device)
    column_C = torch.arange(C, device=q_THD.device)
    k_K1CD = k_KCD[:, None].float()
    rows = max(1, chunk_elements(q_THD.device) // (H * C))
    for first in range(0, T, rows):
        q_HtD = q_THD[first : first + rows].transpose(0, 1).float()
        logits_HtC = (q_HtD.view(K, H // K, -1, D) @ k_K1CD.mT).flatten(0, 1) * scale
        if softcap is not None:
            logits_HtC = softcap * torch.tanh(logits_HtC / softcap)
        position_t1 = torch.arange(start + first, start + first + logits_HtC.shape[1], device=q_THD.device)[:, None]
        logits_HtC = logits_HtC.masked_fill(~visible(column_C, position_t1, window), -torch.inf)
        mass_HC += logits_HtC.softmax(-1).sum(1)
    return mass_HC


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
        mass_HC[head, column_N] += logits_tN.softmax(-1).sum(0)
    return mass_HC

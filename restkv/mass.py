"""Attention an entry has collected: what H2O accumulates, without ever holding an L x L matrix.

Letters: H query heads, K KV heads, G = H / K, T queries, C columns, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.masks import visible
from restkv.observe import chunk_elements


def column_mass(
    q_THD: Tensor, k_KCD: Tensor, start: int, *, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Softmax weight every column receives from queries start ... start + T - 1, summed: [H, C] float32.

    Causal; computed in blocks of queries, so that the largest temporary has chunk_elements numbers.

    Args:
        q_THD, k_KCD: after RoPE; column c is position c, and C = start + T.
    """
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

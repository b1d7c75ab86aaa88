"""From scores to the entries that stay.

Letters: B batch rows, C entries of one head (columns), X KV heads or query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget: int | Tensor) -> Tensor:
    """Keep the `budget` best entries of every head.

    Protected entries come first, then the highest scores; NaN counts as -inf; of equal scores the older position loses.
    Neither the order of the columns nor the device changes the outcome, and nothing waits for the device.

    Args:
        score_BXC: float, higher stays.
        pos_BXC: int, position of each entry, unique within a head; -1 = no entry, never kept.
        protected_BXC: bool, kept whatever the score, even where they outnumber the budget.
        budget: entries to keep per head: an int, [B] or [B, X].

    Returns:
        keep [B, X, C] bool with exactly min(entries, max(budget, protected entries)) True per head.
    """
    exists_BXC = pos_BXC >= 0
    protected_BXC = protected_BXC & exists_BXC
    budget_BX = torch.as_tensor(budget, device=pos_BXC.device)
    if budget_BX.ndim == 1:
        budget_BX = budget_BX[:, None]
    kept_BX = torch.minimum(exists_BXC.sum(-1), torch.maximum(budget_BX, protected_BXC.sum(-1)))

    # Sort by (rank, score, position): the least significant key first, each sort stable.
    rank_BXC = exists_BXC.int() + protected_BXC.int()
    score_BXC = score_BXC.masked_fill(score_BXC.isnan(), -torch.inf)
    order_BXC = pos_BXC.argsort(dim=-1, descending=True, stable=True)
    for key_BXC in (score_BXC, rank_BXC):
        nested = key_BXC.gather(-1, order_BXC).argsort(dim=-1, descending=True, stable=True)
        order_BXC = order_BXC.gather(-1, nested)
    best_first_BXC = torch.arange(pos_BXC.shape[-1], device=pos_BXC.device) < kept_BX[..., None]
    return torch.zeros_like(exists_BXC).scatter(-1, order_BXC, best_first_BXC)

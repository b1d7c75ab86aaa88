"""Whose budget: how a number of entries per head is shared out among layers and heads.

Letters: B batch rows, X heads with a kept set of their own (KV or query heads), C entries of one head (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from restkv.select import select


@dataclass(frozen=True)
class Allocation:
    """Uniform: every head of every layer keeps the same number of entries (the base of the other allocations)."""

    name: ClassVar[str] = "uniform"
    ragged: ClassVar[bool] = False  # heads of one layer may keep different numbers
    across_layers: ClassVar[bool] = False  # one selection over all layers (Global)

    def layers(self, budget: int, window: int, num_layers: int, length: int) -> list[int]:
        """Entries per head of every layer, window included, for a prompt of `length` tokens and a mean budget."""
        return [budget] * num_layers

    def select(self, score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget_B: Tensor) -> Tensor:
        """keep [B, X, C] bool: `budget_B` entries per head on average, protected ones included (see restkv.select)."""
        return select(score_BXC, pos_BXC, protected_BXC, budget_B)


ALLOCATIONS: dict[str, type[Allocation]] = {cls.name: cls for cls in (Allocation,)}

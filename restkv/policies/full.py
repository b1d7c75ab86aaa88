"""No eviction: the control every other policy is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy


@dataclass(frozen=True)
class FullCache(Policy):
    """Keep every entry at its own position (docs/sources.md §2.1)."""

    name: ClassVar[str] = "full"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False

    budget: None = None

    def _check_budget(self) -> None:
        self._require(self.budget is None, "budget", "the full cache has no budget; choose another method to evict")

    def importance(self, obs: Observation) -> Tensor:
        """All entries alike, [B, K, C]."""
        return torch.zeros(obs.pos.shape, dtype=obs.dtype, device=obs.pos.device)

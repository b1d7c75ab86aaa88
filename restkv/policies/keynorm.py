"""KeyNorm (Devoto et al., 2024, arXiv 2406.11430): keys of small norm tend to be attended to, so those stay.

Letters: B batch rows, K KV heads, C entries of one head (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Score = -||k||, which RoPE does not change; nothing is protected. Needs neither queries nor attention.

    The authors' code leaves the first two layers uncompressed; give one budget per layer for that.
    """

    name: ClassVar[str] = "keynorm"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)

    window: int = 0

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C]."""
        return -torch.linalg.vector_norm(obs.k, dim=-1, dtype=obs.dtype)

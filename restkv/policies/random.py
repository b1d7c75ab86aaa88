"""Random: a coin per entry, the floor every other policy must beat.

Letters: B batch rows, X KV heads or query heads, C entries of one head (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy
from restkv.policies.hashes import mix


@dataclass(frozen=True)
class Random(Policy):
    """Score = a hash of (seed, layer, head, position), uniform in [0, 1); nothing is protected.

    Without a generator there is no state: a row of a batch draws as it would alone, and an entry keeps its number as long
    as it lives, so that repeated evictions keep one random set and do not favour the newest.
    """

    name: ClassVar[str] = "random"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    reductions: ClassVar[tuple[str, ...]] = ("mean",)

    window: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        self._require(valid and 0 <= self.seed < 1 << 32, "seed", "give a whole number from 0 to 2^32 - 1")

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C], or [B, H, C] with a set per query head."""
        pos_BXC = obs.held if self.granularity == "query" else obs.pos
        heads = pos_BXC.shape[1]
        head_X1 = (obs.ranks.rank * heads + torch.arange(heads, device=pos_BXC.device))[:, None]
        state = mix(torch.full_like(head_X1, self.seed) ^ mix(head_X1 * 4096 + obs.layer))
        return (mix(state ^ pos_BXC.long()) >> 8).to(obs.dtype) / (1 << 24)  # 24 bits: exact in float32

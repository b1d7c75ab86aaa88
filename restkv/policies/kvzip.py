"""KVzip (Kim et al., 2025, arXiv 2505.23416): keep what the model looks at when it repeats the text.

Letters: B batch rows, H query heads, C entries of one head (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from restkv.budgets import Allocation, Global
from restkv.observe import Observation, strongest_attention
from restkv.policies.base import Policy


@dataclass(frozen=True)
class KVzip(Policy):
    """Score = the largest softmax weight that any observed query of the group's heads gives; one budget for the whole model.

    The queries are those of a replay of the text, whose eviction so serves any question (docs/sources.md §2.9). As published,
    nothing but the score decides who shares the budget (Global without a floor), the first 4 entries stay, and nothing is evicted
    while decoding. An `interval` evicts then by the last `window` queries.
    """

    name: ClassVar[str] = "kvzip"
    exchanges: ClassVar[str | None] = "nothing"

    window: int = 8
    sinks: int = 4
    gqa: str = "max"
    interval: int | None = None
    budget_by: str | Allocation | None = None
    probe: str = "replay"

    def __post_init__(self) -> None:
        if self.budget_by is None and not isinstance(self.budget, tuple):
            object.__setattr__(self, "budget_by", Global(floor=0.0))
        super().__post_init__()
        self._require(
            self.window >= 1, "window", "at least one query has to be observed while decoding; give 1 or more"
        )

    def importance(self, obs: Observation) -> Tensor:
        """[B, H, C]."""
        return strongest_attention(obs)

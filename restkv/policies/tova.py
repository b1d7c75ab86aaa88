"""TOVA (Oren et al., 2024, arXiv 2401.06104): drop what the newest query attends to least, one choice for all heads.

Letters: B batch rows, H query heads, K KV heads, C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from restkv.observe import Observation, attention_BHWC
from restkv.policies.base import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Score = the newest query's softmax weight, mean over ALL query heads of the layer (docs/sources.md §2.4).

    It evicts after every step, keeps one set per layer and protects nothing, not even the newest token (window = 0);
    kvpress protects that one (window = 1).

    Preset: "official" (the 512 entries of the authors' README).
    """

    name: ClassVar[str] = "tova"
    exchanges: ClassVar[str | None] = "sums"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"official": {"budget": 512}}

    window: int = 0
    interval: int | None = 1

    @property
    def observed(self) -> int:
        """The newest query decides alone."""
        return 1

    def importance(self, obs: Observation) -> Tensor:
        """Mean attention [B, K, C], the same for every KV head: all hold the same entries, in columns of any order."""
        newest = replace(obs, q=obs.q[:, :, -1:], q_pos=obs.q_pos[:, -1:])
        order_BHC = obs.order
        sum_B1C = attention_BHWC(newest)[:, :, 0].gather(-1, order_BHC).sum(1, keepdim=True)
        mean_B1C = obs.ranks.sum(sum_B1C) / (obs.q.shape[1] * obs.ranks.size)
        rank_BKC = order_BHC[:, :: obs.group].argsort(-1)
        return mean_B1C.expand_as(rank_BKC).gather(-1, rank_BKC)

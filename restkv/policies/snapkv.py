"""SnapKV (Li et al., 2024, arXiv 2404.14469): attention of the prompt's last queries, pooled over neighbours.

Letters: B batch rows, H query heads, C entries of one head (columns), W observed queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from restkv import pooling
from restkv.observe import Observation, strongest_attention, weighted_attention
from restkv.policies.base import Policy
from restkv.pooling import WIDEST


@dataclass(frozen=True)
class SnapKV(Policy):
    """Score = sum over the last W queries of their softmax weight on the entry, then pooled (docs/sources.md §2.5).

    Presets: "official" (the LongBench configs of SnapKV's repository: W = 32, kernel 7, max), "paper" (the variant that
    the ReST-KV paper's code compares with: W = 32, kernel 5, average), both with one set per query head and a single
    eviction after the prompt, as released. Without a preset: kernel 5, average, one set per KV head (mean over the
    group after pooling), evicting again every `interval` tokens.
    """

    name: ClassVar[str] = "snapkv"
    exchanges: ClassVar[str | None] = "nothing"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"window": 32, "kernel_size": 7, "pooling": "max", "granularity": "query", "interval": None},
        "paper": {"window": 32, "kernel_size": 5, "pooling": "avg", "granularity": "query", "interval": None},
    }

    kernel_size: int = 5  # entries pooled over, odd
    pooling: str = "avg"  # "avg" (zeros beyond the ends count), "max" or "none"
    reduction: str = "mean"  # over the observed queries; "max" suits a probe of many

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.window >= 1, "window", "at least one query has to be observed; give 1 or more")
        valid = not isinstance(self.kernel_size, bool) and self.kernel_size in range(1, WIDEST, 2)
        self._require(valid, "kernel_size", f"give an odd number of at least 1, below {WIDEST}")
        self._one_of("pooling", ("avg", "max", "none"))
        self._one_of("reduction", ("mean", "max"))

    def importance(self, obs: Observation) -> Tensor:
        """Pooled attention [B, H, C]."""
        if self.reduction == "max":
            score_BHC = strongest_attention(obs)
        else:
            score_BHC = weighted_attention(obs, (obs.q_pos >= 0).to(obs.dtype))
        if self.pooling == "none":
            return score_BHC
        pool = partial(pooling.average if self.pooling == "avg" else pooling.maximum, kernel=self.kernel_size)
        return pooling.over_past(lambda line_BHC, _: pool(line_BHC), score_BHC, obs.past, obs.order)

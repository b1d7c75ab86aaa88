"""H2O (Zhang et al., 2023, arXiv 2306.14048): the heavy hitters of all attention so far, and the newest entries.

Letters: B batch rows, K KV heads, X KV heads or query heads, C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from restkv.observe import Observation
from restkv.policies.slots import Slotted


@dataclass(frozen=True)
class H2O(Slotted):
    """Score = softmax weight collected from every query so far, prompt and answer, causally (docs/sources.md §2.3).

    The sum belongs to its entry and dies with it. The newest `recent` entries always stay. A KV head collects the mean
    over its group (the authors' code has no GQA), so a maximum is not offered: it would need a sum per query head.

    per_query=True divides by the number of queries that could see the entry: older entries no longer win by age alone.

    Presets: "official" (4 heavy + 512 recent, the class defaults of the authors' repository), "streaming" (48 + 2000
    with slot positions, its demo), "ratio" (10% + 10% of the prompt, its text generation example), "paper" (the variant
    in the ReST-KV paper's code: one eviction after the prompt, 32 recent, one set per query head), "observed-attention"
    (kvpress's ObservedAttentionPress). What that paper's variant computes is not reproduced: there all but the last 32
    prompt queries also attend to the future, because only the corner of the attention matrix is masked.
    """

    name: ClassVar[str] = "h2o"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    reductions: ClassVar[tuple[str, ...]] = ("mean",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"budget": 4 + 512, "recent": 512},
        "streaming": {"budget": 48 + 2000, "recent": 2000, "positions": "slot"},
        "ratio": {"budget": 0.2},
        "paper": {"recent": 32, "granularity": "query", "interval": None},
        "observed-attention": {"recent": 0, "per_query": True, "interval": None},
    }

    window: int = 0
    interval: int | None = 1
    recent: int | None = None  # newest entries that always stay; None: half the budget
    per_query: bool = False  # mean over the queries that saw the entry, not their sum
    positions: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None:
            is_whole = isinstance(self.recent, int) and not isinstance(self.recent, bool)
            self._require(is_whole and self.recent >= 0, "recent", "give a whole number, or None for half the budget")
            least = min(self.budget) if isinstance(self.budget, tuple) else self.budget
            fits = not isinstance(least, int) or self.recent <= least
            self._require(fits, "recent", f"they are part of the budget of {least}; lower them or raise it")

    @property
    def needs(self) -> frozenset[str]:
        """The attention each entry has collected."""
        return frozenset({"mass"})

    @property
    def observed(self) -> int:
        """Every query since the last eviction adds to the mass."""
        return max(self.window, self.interval or 1)

    def newest(self, budget: int) -> int:
        """`recent` entries or half the budget, and no fewer than `window`."""
        return max(self.window, budget // 2 if self.recent is None else self.recent)

    def importance(self, obs: Observation) -> Tensor:
        """Collected attention: [B, K, C], or [B, H, C] with a set per query head."""
        assert obs.mass is not None, "this policy needs the attention its entries have collected (Policy.needs)"
        if not self.per_query:
            return obs.mass
        queries_BKC = obs.q_pos[:, -1, None, None] + 1 - obs.pos
        if obs.sliding_window is not None:
            queries_BKC = queries_BKC.clamp_max(obs.sliding_window)
        return obs.mass / queries_BKC.clamp_min(1).repeat_interleave(obs.mass.shape[1] // obs.pos.shape[1], 1)

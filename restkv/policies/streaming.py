"""StreamingLLM (Xiao et al., 2023, arXiv 2309.17453): the first tokens, which soak up attention, and the newest ones.

Letters: B batch rows, K KV heads, C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from restkv.observe import Observation
from restkv.policies.slots import Slotted


@dataclass(frozen=True)
class StreamingLLM(Slotted):
    """Keep `sinks` first positions and the budget - sinks newest, in every head of every layer (docs/sources.md §2.2).

    It evicts after every step and renumbers: an entry has the RoPE phase of its slot, so that no distance is ever larger
    than the cache. positions="original" leaves the phases of the text.

    Presets: "official" (4 + 512, the class default of the authors' repository), "chat" (4 + 2000) and "perplexity"
    (1 + 255), its two scripts; "paper" (one eviction after a dense prefill, original positions, as the ReST-KV paper's
    LongBench, RULER and InfiniteBench runs have it), "paper-needle" (the same code as its needle runner sets it: the first
    budget - 32 and the last 32 tokens).
    """

    name: ClassVar[str] = "streamingllm"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"budget": 4 + 512},
        "chat": {"budget": 4 + 2000},
        "perplexity": {"budget": 1 + 255, "sinks": 1},
        "paper": {"positions": "original", "interval": None},
        "paper-needle": {"positions": "original", "interval": None, "window": 32, "sinks": 0, "fill": "first"},
    }

    window: int = 0
    sinks: int = 4
    interval: int | None = 1
    fill: str = "newest"  # what the budget holds besides sinks and window: the "newest" entries, or the "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("fill", ("newest", "first"))

    def importance(self, obs: Observation) -> Tensor:
        """Position [B, K, C], newer stays; or older, for fill="first"."""
        return (obs.pos if self.fill == "newest" else -obs.pos).to(obs.dtype)

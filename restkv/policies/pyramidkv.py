"""PyramidKV (Cai et al., 2024, arXiv 2406.02069): SnapKV's score, with more entries for early layers than for late ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from restkv.budgets import Allocation
from restkv.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV(budget_by="pyramid") under its own name (docs/sources.md §2.6); the budget is the mean over layers."""

    name: ClassVar[str] = "pyramidkv"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"window": 32, "kernel_size": 5, "pooling": "avg", "granularity": "query", "interval": None}
    }

    budget_by: str | Allocation = "pyramid"

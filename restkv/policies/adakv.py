"""AdaKV (Feng et al., 2024, arXiv 2407.11550): SnapKV's score, with more entries for the heads of a layer that spread it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from restkv.budgets import Allocation
from restkv.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV(budget_by="adakv") under its own name (docs/sources.md §2.7); the budget is the mean over the heads of a layer."""

    name: ClassVar[str] = "adakv"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official": {"window": 32, "kernel_size": 7, "pooling": "max", "interval": None}
    }

    budget_by: str | Allocation = "adakv"

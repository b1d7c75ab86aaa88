"""Entries that are renumbered: RoPE counts slots of the cache instead of positions in the text."""

from __future__ import annotations

from dataclasses import dataclass

from restkv.budgets import Allocation
from restkv.policies.base import Policy


@dataclass(frozen=True)
class Slotted(Policy):
    """A policy with a choice of positions.

    With "slot" no distance is ever larger than the cache, as in StreamingLLM: the engine keeps unrotated keys and gives the
    survivors of an eviction the phases of their new slots; the next token's position is the number of entries left.
    """

    positions: str = "slot"  # RoPE phase of an entry: its "slot" in the cache, or its "original" position in the text

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("positions", ("slot", "original"))
        self._require(
            not self.slot_positions or (self.budget_by == Allocation() and not isinstance(self.budget, tuple)),
            "positions",
            'a slot is a position only where all heads and layers keep the same number; choose "original", or one budget '
            'with budget_by="uniform"',
        )
        self._require(
            not self.slot_positions or self.granularity == "kv",
            "positions",
            "a slot is a position only where all heads hold the same number, which unions of query heads' sets do not; "
            'choose "original", or granularity="kv"',
        )

    @property
    def slot_positions(self) -> bool:
        """Whether entries are renumbered after every eviction."""
        return self.positions == "slot"

"""When a session evicts, when it compacts, and for how many tokens its page lists have room: all counted in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from restkv.policies.base import Policy
from restkv.sizing import AHEAD

COMPACT_EVERY = 32  # tokens between two compactions when eager evictions come more often
# Compiled evictions only mask, and slots of the dead are read along with their pages until they are compacted: after so many
# tokens, or when they are such a share of all slots, whichever comes first (docs/performance.md has the measurement).
MASKED_EVERY, DEAD_SHARE = 64, 1 / 5


@dataclass
class Schedule:
    """The clock of one session's rows, which share it.

    Args:
        interval: tokens between two evictions; None: none while decoding.
        period: tokens between two compactions, a multiple of the interval; 0: none.
        planned: tokens still expected.
        since_eviction, since_compaction: tokens taken in since.
        longest: tokens of the longest row, at most.
        limit: a row that is no longer has nothing to lose; 0: nobody knows, or attention has to be counted all the same.
        room: tokens for which every list has pages of its own; what they share with a fork does not count.
    """

    interval: int | None
    period: int
    planned: int
    since_eviction: int = 0
    since_compaction: int = 0
    longest: int = 0
    limit: int = 0
    room: int = 0

    @classmethod
    def of(
        cls, policy: Policy, planned: int, entries: float, masks: bool, longest: int = 0, limit: int = 0
    ) -> Schedule:
        """The schedule of a policy's evictions.

        Args:
            entries: per head that an eviction leaves, on average.
            masks: evictions while decoding are compiled and only mask.
            longest, limit: see Schedule.
        """
        interval = policy.interval if policy.budget is not None else None
        if not interval:
            return cls(interval, 0, planned)
        every = interval
        if policy.compact_every is not None:
            every = policy.compact_every
        elif masks:
            every = min(MASKED_EVERY, int(entries * DEAD_SHARE / (1 - DEAD_SHARE)))
        elif interval < COMPACT_EVERY // 4:  # very frequent evictions only mark entries dead
            every = COMPACT_EVERY + interval - 1
        return cls(interval, max(1, every // interval) * interval, planned, longest=longest, limit=limit)

    @property
    def compacts_next(self) -> bool:
        """Whether an eviction after the next token would compact."""
        return self.since_compaction + 1 >= self.period

    @property
    def evicts_soon(self) -> bool:
        """Whether the tokens still expected reach an eviction that may have something to do."""
        reaches = self.interval is not None and self.since_eviction + self.planned >= self.interval
        return reaches and self.longest + self.planned > self.limit

    @property
    def may_evict(self) -> bool:
        """Whether a row may be over its budget."""
        return self.longest > self.limit

    def ahead(self, page: int) -> int:
        """For how many tokens to reserve room now: up to the next compaction, or to the end of a page of `page` slots."""
        room = self.period - self.since_compaction if self.interval else page
        if self.planned > 0:  # a page for tokens that will not come could outgrow the pool, and recompile
            room = min(room, self.planned)
        return min(room, AHEAD)  # of a long interval as much as is soon needed

    def may_draw(self, drawn: int, most: int, masks: bool) -> bool:
        """Whether a burst of `drawn` tokens, the last not yet fed, may grow towards `most` without running into what needs the
        host: a compaction, and an eviction unless it only masks.
        """
        if drawn >= most or self.interval is None:
            return drawn < most
        if self.since_eviction + 1 < self.interval:
            return True
        return masks and not self.compacts_next

    def take(self, tokens: int) -> bool:
        """Count tokens; True where an eviction is due, which then counts as done."""
        self.since_eviction += tokens
        self.since_compaction += tokens
        self.longest += tokens
        due = bool(self.interval) and self.since_eviction >= (self.interval or 0)
        if due:
            self.since_eviction = 0
        return due

    def compacted(self) -> None:
        self.since_compaction = self.room = 0

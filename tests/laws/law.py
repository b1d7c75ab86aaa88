"""The watch over the engine (restkv/testing/watch.py) for those who know LaCache's ladders."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from restkv.evict import Evictor
from restkv.policies import LaCache, Policy
from restkv.testing import watch
from twins.reference_policies import Ladders


@dataclass
class Watch(watch.Watch):
    """Also follows LaCache's ladders, which must not be forked meanwhile unless `ladders` is False."""

    ladders: bool = True
    _ladders: dict[int, tuple[object, Ladders]] = field(default_factory=dict)

    def _chosen(
        self, evictor: Evictor, row: int, before: list[list[list[int]]], after: list[list[list[int]]], length: int
    ) -> None:
        """LaCache's own rule, in the slots of docs/sources.md §2.8 as long as nothing but sinks is protected there."""
        policy, state = evictor.policy, evictor.states[row]
        if not isinstance(policy, LaCache):
            return
        layers = len(before)
        for heads in after:
            assert all(head == heads[0] for head in heads), "all heads of a layer keep the same slots"
        assert len({len(heads[0]) for heads in after}) == 1, "all layers keep the same number"
        if (
            not self.ladders
            or policy.window
            or policy.protect
            or before[0][0][: policy.sinks] != list(range(policy.sinks))
        ):
            return
        span = policy.span or max(layers // 2, 1)
        fresh = state, Ladders(layers, evictor.budgets[0][row], span, policy.overlap, policy.sinks)
        _, ladders = self._ladders.setdefault(id(state), fresh)
        if ladders.strange:
            return
        lines = ladders(len(before[0][0]))
        if not ladders.strange:
            want = [[before[i][0][slot] for slot in line] for i, line in enumerate(lines)]
            assert [heads[0] for heads in after] == want, "not the ladders' slots"

    def _above(self, policy: Policy, layers: int) -> int | None:
        """LaCache adds half of what a ladder drops, once."""
        if not isinstance(policy, LaCache):
            return super()._above(policy, layers)
        ladder = policy.ladder(layers)
        return (ladder.before - ladder.after) // 2


def watched() -> AbstractContextManager[Watch]:
    """restkv.testing.watch.watched with a watch that knows ladders."""
    return watch.watched(Watch())

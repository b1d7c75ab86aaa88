"""A session and the twins of its rows side by side: what one does the others do, and then they agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from modeling.rope import rotate
from restkv.engine import Engine
from restkv.policies import (
    Policy,
)
from restkv.session import Session
from restkv.testing.watch import Snapshot, snapshot
from twins.stepwise import Head, Kept, Ladder, Row

CLOSE = 1e-8


TIE = 1e-5  # scores this close, relative to the larger, may rank either way


class Twin(Row):
    """A row that is told when the engine has evicted, and what it kept."""

    def __init__(self, engine: Engine, policy: Policy, length: int) -> None:
        super().__init__(engine.model, policy)
        layers = self.config.num_layers
        unbounded = policy.budget is None
        self.budgets = [1 << 30] * layers if unbounded else policy.layer_budgets(length, layers)
        self._chooses = not policy.allocation.ragged and "rotary" not in policy.needs
        self.ties = 0

    def fork(self) -> Twin:
        """A twin that goes on by itself."""
        shared = {id(self.model): self.model, id(self.policy): self.policy, id(self.config): self.config}
        return copy.deepcopy(self, shared)

    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of some tokens."""
        return self._run(ids)[-1]

    def settle(self, told: Kept, prompt: bool = False) -> None:
        """The engine evicted, if there was anything to: choose likewise, and lose what it lost."""
        sizes = [max(len(head.pos) for head in layer) for layer in self.heads]
        mark = 0 if prompt else self.policy.high_water or 0
        over = [size > max(budget, mark) for size, budget in zip(sizes, self.budgets, strict=True)]
        if not self._chooses:
            over = [kept != mine for kept, mine in zip(told, self.kept(), strict=True)]
        if not any(over):
            assert told == self.kept()
            return
        if not prompt or isinstance(self._rule, Ladder):
            over = [True] * len(over)
        if self._chooses:
            self._choose(told, over, prompt)
        group = self.config.group
        for block, layer, stays, cut in zip(self.model.blocks, self.heads, told, over, strict=True):
            if not cut:
                continue
            for j, head in enumerate(layer):
                per_query = self.policy.granularity == "query"
                head.keep(stays[j * group : (j + 1) * group] if per_query else [stays[j]] * group)
                if self.policy.slot_positions:
                    self._turn(block.rope, head)

    def _turn(self, rope: int, head: Head) -> None:
        """Positions are slots: the keys of what is left get the phases of their new ranks."""
        count = len(head.pos)
        cos_1CD, sin_1CD = self.model.rotaries[rope](torch.arange(count)[None], torch.tensor([count]), self.model.dtype)
        head.k = rotate(head.raw[None, :, None], cos_1CD, sin_1CD)[0, :, 0]

    def _choose(self, told: Kept, over: Sequence[bool], prompt: bool) -> None:
        """Assert that this twin's own choice is the engine's, near ties aside."""
        if isinstance(self._rule, Ladder):
            lines = self._rule.slots(len(self.heads[0][0].pos))
            if self._rule.slots.strange:
                self._chooses = False  # the released code's indices fail here: from now on only the law watches
            else:
                for layer, line, kept in zip(self.heads, lines, told, strict=True):
                    assert kept == [[head.pos[slot] for slot in line] for head in layer]
            return
        plain = self._rule.ranked
        for index, kept in enumerate(told):
            if not over[index]:
                continue
            values: list[dict[int, float]] = []

            def spy(layer: int, held: Sequence[int], value: dict[int, float]) -> list[int]:
                values.append(value)  # noqa: B023
                return plain(layer, held, value)

            self.budget = self.budgets[index]
            with patch.object(self._rule, "ranked", spy):
                mine = self._rule.layer(index, prompt)
            for h, (ours, theirs) in enumerate(zip(mine, kept, strict=True)):
                if ours != theirs:
                    differ = [values[min(h, len(values) - 1)][p] for p in set(ours) ^ set(theirs)]
                    assert max(differ) - min(differ) <= TIE * max(map(abs, differ)), (index, h, ours, theirs)
                    self.ties += 1


class Live:
    """A session, its twins, and the schedule counted once more."""

    def __init__(self, session: Session, twins: list[Twin], chunk: int, since: int = 0) -> None:
        self.session, self.twins, self.chunk, self.since = session, twins, chunk, since
        self.logits = session.logits_BV
        self.held: Snapshot = snapshot(session.cache)

    def fork(self, session: Session) -> Live:
        return Live(session, [twin.fork() for twin in self.twins], self.chunk, self.since)

    @property
    def rows(self) -> int:
        return len(self.twins)

    def absorb(self, pieces: Sequence[Sequence[int]], told: Iterator[list[Kept]]) -> list[Tensor | None]:
        """The twins read one piece per row and, if an eviction is due after it, follow it: logits of the rows that read."""
        logits = [twin.read(ids) if ids else None for twin, ids in zip(self.twins, pieces, strict=True)]
        policy = self.session.policy
        self.since += max(map(len, pieces))
        if policy.interval and policy.budget is not None and self.since >= policy.interval:
            self.since = 0
            for twin, kept, on in zip(self.twins, next(told), self.session.active, strict=True):
                if on:
                    twin.settle(kept)
        return logits

    def agree(self, logits: Sequence[Tensor | None]) -> None:
        """Logits and entries are the twins'."""
        self.logits, self.held = self.session.logits_BV, snapshot(self.session.cache)
        for row, logits_V in enumerate(logits):
            assert logits_V is None or (self.logits[row] - logits_V).abs().max() < CLOSE, f"row {row}"
        lengths = self.session.cache.next_pos.tolist()
        assert lengths == [twin.length for twin in self.twins]
        for index, lists in enumerate(self.held):
            heads = [head for twin in self.twins for head in twin.heads[index]]
            for entries, head in zip(lists, heads, strict=True):
                assert entries.pos == head.pos
                assert entries.seen is None or entries.seen == head.held.tolist()
                keys = head.raw if self.session.policy.slot_positions else head.k
                assert torch.allclose(entries.k, keys, rtol=0, atol=CLOSE)
                assert torch.allclose(entries.v, head.v, rtol=0, atol=CLOSE)

    def untouched(self) -> None:
        """Nothing has happened to the session since the last `agree`."""
        assert self.session.logits_BV is self.logits
        for mine, theirs in zip(snapshot(self.session.cache), self.held, strict=True):
            for now, then in zip(mine, theirs, strict=True):
                assert now.pos == then.pos and now.seen == then.seen
                assert torch.equal(now.k, then.k) and torch.equal(now.v, then.v)

"""Scores that policies share while one prompt is evicted for all of them: whole ones where they differ only in what follows the
score, else the attention that they are made of.

Letters: B rows, H query heads, C columns, W queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from restkv.observe import Observation
from restkv.policies import Policy

MOST_SHARED = 1 << 26  # of a layer's logits [B, H, W, C] that are kept (256 MiB in float32, and as much of weights)


class BudgetRead(Exception):
    """A score depends on the budget."""


class UnreadTensor(Tensor):
    """Stands for a budget that nobody may look at."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise BudgetRead


class UnreadTuple(tuple[int, ...]):
    """The same of budgets that the host knows, however they are looked at."""

    def _read(self, *_: Any) -> Any:
        raise BudgetRead

    __iter__ = __len__ = __getitem__ = __contains__ = __eq__ = __ne__ = __hash__ = _read


@dataclass
class Scores:
    """Scores of one layer, for policies that differ only in what follows the score.

    Attributes:
        free: (class and options, budgets or None for a score that does not depend on them) -> score.
        bound: classes and options whose scores depend on the budget.
        views: (probe, number of its look, queries) -> what was first seen so, whose memo the others share.
    """

    free: dict[tuple[object, object], Tensor] = field(default_factory=dict)
    bound: set[object] = field(default_factory=set)
    views: dict[tuple[object, ...], Observation] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget a layer."""
        self.free.clear()
        for view in self.views.values():
            if view.memo is not None:
                view.memo.clear()  # what is in it may lead back to it, and would stay for a while
        self.views.clear()

    def of(self, policy: Policy, obs: Observation) -> Tensor:
        later = {"budget", "budget_by", "interval", "high_water", "refit"}
        kind = (type(policy), *(getattr(policy, option.name) for option in fields(policy) if option.name not in later))
        if kind not in self.bound:
            try:
                unread: dict[str, Any] = {"budget_B": UnreadTensor(), "budgets": UnreadTuple()}
                return self._once(policy, (kind, None), replace(obs, **unread))
            except BudgetRead:
                self.bound.add(kind)
        return self._once(policy, (kind, obs.budgets), obs)

    def _once(self, policy: Policy, key: tuple[object, object], obs: Observation) -> Tensor:
        if key not in self.free:
            looks = tuple(
                look._replace(of=partial(self._view, look.of, (policy.probe, number)))
                for number, look in enumerate(obs.looks)
            )
            obs = replace(obs, looks=looks) if looks else self._shared(obs, ())
            self.free[key] = policy.score(obs)
        return self.free[key]

    def _view(
        self, of: Callable[[Observation], Observation], name: tuple[object, ...], obs: Observation
    ) -> Observation:
        return self._shared(of(obs), name)

    def _shared(self, obs: Observation, name: tuple[object, ...]) -> Observation:
        """An observation of this layer, with the very tensors and the memo of the first that sees the same."""
        if obs.q.shape[1] * obs.q.shape[2] * obs.k.shape[2] > MOST_SHARED:
            return obs
        first = self.views.setdefault((*name, obs.q.shape[2]), replace(obs, memo={}))
        return replace(obs, q=first.q, q_pos=first.q_pos, k=first.k, v=first.v, pos=first.pos, memo=first.memo)


def sharing(policy: Policy, scores: Scores) -> Policy:
    """The same policy, which asks `scores` first."""
    kind = type(policy.name, (type(policy),), {"score": lambda _, obs: scores.of(policy, obs)})
    return kind(**{option.name: getattr(policy, option.name) for option in fields(policy)})

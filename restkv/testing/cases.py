"""What laws are tried on, drawn by hypothesis: observations, jobs of a session (schedules), and caches after them.

Letters: C entries (columns), W observed queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from hypothesis import strategies as st

from modeling.cache import KVCache
from restkv.errors import PolicyError
from restkv.observe import Observation
from restkv.policies import Policy
from restkv.policies.base import TOO_MANY
from restkv.probes import WINDOW
from restkv.testing.observed import observation, prepared
from restkv.testing.sessions import Job

BUDGET = 12  # entries per head of the small policies that laws are tried with
SEEDS = st.integers(0, 999)  # few digits: a failing case is read by people

shapes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "queries": st.integers(1, 6),
        "columns": st.integers(1, 24),
        "head_dim": st.integers(1, 5),
        "width": st.integers(1, 9),
        "ragged": st.booleans(),
        "shuffled": st.booleans(),
        "softcap": st.sampled_from([None, 1.5]),
        "sliding_window": st.sampled_from([None, 1, 5, 30]),
    }
)


@dataclass(frozen=True)
class Look:
    """A random observation, as data: the arguments of restkv.testing.observation, and a budget.

    Attributes:
        rows, kv_heads, group, queries, columns, head_dim, width: B, K, H / K, W, C, D and E.
        budget: entries per head that are to be kept of the first row; of each row after it `apart` more.
    """

    seed: int = 0
    rows: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 1
    columns: int = 20
    head_dim: int = 4
    width: int = 6
    ragged: bool = False
    shuffled: bool = False
    per_head: bool = False
    softcap: float | None = None
    sliding_window: int | None = None
    budget: int = BUDGET
    apart: int = 0

    @property
    def budgets(self) -> list[int]:
        """Entries per head of every row."""
        return [self.budget + row * self.apart for row in range(self.rows)]

    def observed(self, policy: Policy) -> Observation:
        """The observation, with all that the policy needs to choose from it."""
        drawn = vars(self) | {"per_head": self.per_head and policy.granularity == "query"}
        del drawn["budget"], drawn["apart"]
        return prepared(policy, *observation(**drawn), self.budgets)


@st.composite
def looks(draw: Callable[..., Any], policy: Policy) -> Look:
    """Observations as data, for a policy: some more columns than its budget has entries, now and then fewer."""
    budget = _budget(policy)
    most = budget + 20
    observed = max(1, min(policy.observed_prompt, 6))
    return Look(
        seed=draw(SEEDS),
        rows=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, observed)),
        columns=draw(st.integers(budget + 1, most) | st.integers(1, most)),
        head_dim=draw(st.sampled_from([4, 2, 6] if "rotary" in policy.needs else [4, 1, 3])),
        width=draw(st.sampled_from([6, 1])),
        ragged=draw(st.booleans()),
        shuffled=draw(st.booleans()),
        per_head=policy.granularity == "query" and draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 1.5])),
        sliding_window=draw(st.sampled_from([None, 5, 30])),
        budget=budget,
        apart=draw(st.sampled_from([0, 1, 4])) if isinstance(policy.budget, int) else 0,
    )


@st.composite
def observations(draw: Callable[..., Any], policy: Policy) -> Observation:
    """Observations of one layer, with all that a policy needs to choose from them (float64; rows are ragged, columns in any
    order, and what lies in padding is a large number)."""
    small = fitted(policy)
    return draw(looks(small)).observed(small)


@st.composite
def schedules(draw: Callable[..., Any], policy: Policy, *, vary: bool = True) -> Job:
    """What a session is asked to do: a tiny model, prompts, chunks, tokens that follow, and a policy whose interval, high-water
    mark, budget and protected spans vary around its own.

    Args:
        vary: False leaves the policy as it is given.
    """
    small = fitted(policy)
    layers = len(small.budget) if isinstance(small.budget, tuple) else 3
    budget = max(small.budget) if isinstance(small.budget, tuple) else _budget(small)
    lengths = draw(st.lists(st.integers(budget + 1, budget + 20) | st.integers(1, budget), min_size=1, max_size=3))
    chosen = small
    if vary and small.budget is not None:
        options = {"interval": draw(st.sampled_from([2, 1, 3, 3, 2, 5, None]))}
        options["high_water"] = draw(st.sampled_from([None, None, None, budget + 5]))
        if isinstance(small.budget, int):
            least = max(1, small.window + small.sinks)
            spans = {"protect": ((1, 4), (8, 11)), "budget": budget + 6}
            edges = [{"budget": budget + 5}, {"budget": least + 1}, {"budget": least}, spans]
            options |= draw(st.sampled_from([{}] * 4 + edges))
        chosen = attempt(small, options) or small
    return Job(
        policy=chosen,
        seed=draw(SEEDS),
        lengths=tuple(lengths),
        new=draw(st.integers(5, 9) | st.integers(0, 9)),
        chunk=draw(
            st.sampled_from([None, None, 7 if chosen.probe == WINDOW else None])
        ),  # a chunk takes no other probe
        windows=tuple(draw(st.lists(st.sampled_from([None, None, 6]), min_size=layers, max_size=layers))),
        kv_heads=draw(st.sampled_from([2, 1])),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        softcap=draw(st.sampled_from([None, None, 1.5])),
        qk_norm=draw(st.booleans()),
    )


@st.composite
def caches(draw: Callable[..., Any], policy: Policy) -> KVCache:
    """Caches as a session of this policy leaves them: page lists, and `pos` with holes, after prompts and evictions."""
    return draw(schedules(policy)).run().session.cache


def fitted(policy: Policy) -> Policy:
    """The policy with a budget, a window and sinks that small cases outgrow; what an option of its own forbids stays as it is.

    >>> from restkv.policies import SnapKV
    >>> fitted(SnapKV(1024, sinks=4)).budget
    12
    """
    if policy.budget is None:
        return policy
    small: dict[str, Any] = {"window": min(policy.window, 4), "sinks": min(policy.sinks, 2)}
    room = small["window"] + small["sinks"] + sum(end - start for start, end in policy.protect)
    least = max(BUDGET, room + 2)
    if isinstance(policy.budget, tuple):
        small["budget"] = tuple(min(budget, least + layer % 3) for layer, budget in enumerate(policy.budget))
    elif isinstance(policy.budget, int):
        small["budget"] = min(policy.budget, least)
    if policy.high_water is not None and not isinstance(policy.budget, float):
        small["high_water"] = min(policy.high_water, least + 6)
    for options in (
        small,
        {name: value for name, value in small.items() if name != "budget"},
        {"window": small["window"]},
    ):
        if (tried := attempt(policy, options)) is not None:
            return tried
    return policy


def attempt(policy: Policy, options: dict[str, Any]) -> Policy | None:
    """The policy with other options; None where it refuses them, for a model of three layers too."""
    try:
        tried = replace(policy, **options)
        tried.layer_budgets(64, len(tried.budget) if isinstance(tried.budget, tuple) else 3)
        assert tried.newest(_budget(tried)) < TOO_MANY
    except PolicyError:
        return None
    return tried


def _budget(policy: Policy) -> int:
    """Entries per head in an observation: of a fraction, those of a prompt of 30 tokens."""
    return BUDGET if policy.budget is None else policy.budget_for(30)


def as_arguments(case: Look | Job) -> dict[str, Any]:
    """The fields of a case but its policy, those alone that are not their default."""
    values = {field.name: (getattr(case, field.name), field.default) for field in fields(case)}
    return {name: value for name, (value, default) in values.items() if name != "policy" and value != default}

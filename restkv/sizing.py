"""How much room a session's cache has from the start, and what to say where there is none.

A shape of cache is a graph to compile, and room is memory: both are to be few. A cache that a policy bounds has its whole room at
once and never changes; any other begins with the prompt and some tokens more, and grows through few sizes (modeling/pool.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from modeling.config import ModelConfig
from modeling.layers import Decoder
from modeling.pool import Companions, pool_size
from restkv.errors import TooLargeError
from restkv.policies.base import Policy

AHEAD = 512  # tokens for which a cache that grows with them has room from the start
FIXED = 8192  # entries per head up to which a bounded cache has all its room from the start, whatever the prompt
LEAST_PAGES = 4  # of a list in a compiled cache that grows: smaller ones would be more shapes
# Of a compiled eviction whose lists may have any length; fewer would be more graphs, and hardly faster.
LEAST_COLUMNS = 512
# Evictions of lists that are longer than those of any graph, before one is made for them. A graph pays for itself after 180
# evictions where its kernels lie ready, after 700 where they are to be made (docs/performance.md, ReST-KV).
PATIENCE = 256


@dataclass(frozen=True)
class Job:
    """What a session is to do.

    Args:
        lengths: tokens of each row's prompt.
        budgets: entries per head that each row may keep, the mean over layers.
        max_new_tokens: of an answer, at most.
        interval, period: tokens between two evictions (None: none while decoding), and between two compactions (0).
        chunk: tokens that are appended at once, at most; 0 if always one.
        forks: alive at the same time.
        compiled: few shapes are wanted, at the cost of more room.
    """

    lengths: Sequence[int]
    budgets: Sequence[int]
    max_new_tokens: int
    interval: int | None
    period: int
    chunk: int
    forks: int
    compiled: bool


@dataclass(frozen=True)
class Room:
    """Room of a cache, per list of pages.

    Attributes:
        entries: from the start.
        max_entries: that will ever be needed; None: nobody knows.
        longest: entries of the longest list, where heads of a layer keep the same number; 0: the prompt decides.
        page: slots of a page.
        forks: pages for forks besides.
        every_row: rows that are only padding have room too, so that its shape is that of the full number of rows.
    """

    entries: int
    max_entries: int | None
    longest: int
    page: int
    forks: int
    every_row: bool


def companions_of(policy: Policy, model: Decoder) -> Companions:
    """The per-slot data a cache must carry for this policy."""
    config = model.config
    per_query = policy.granularity == "query"
    companions: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if per_query and policy.budget is not None:
        companions["keep"] = ((config.group,), torch.bool)
    if "mass" in policy.needs:
        companions["mass"] = ((config.group if per_query else 1,), torch.float32)
    if policy.biased:
        companions["bias"] = ((), torch.float32)
    if policy.slot_positions:
        companions["raw"] = ((config.head_dim,), model.dtype)
    return companions


def mean_budgets(budgets_NB: Sequence[Sequence[int]], policy: Policy) -> list[int]:
    """Entries per head that each row may keep, the mean over layers; whatever the prompt, where the budget is a number."""
    layers = len(budgets_NB)
    least = policy.at_most(layers)[0] if _fixed(policy) else 0
    return [max(least, -(-sum(row_N) // layers)) for row_N in zip(*budgets_NB, strict=True)]


def room_for(job: Job, policy: Policy, config: ModelConfig) -> Room:
    """Room for a session. It does not depend on the prompt where the budget is a number of at most FIXED entries."""
    union = config.group if policy.granularity == "query" else 1  # query heads may keep disjoint sets
    budgets = [max(budget, policy.high_water or 0) * union for budget in job.budgets]
    fixed, longest = _fixed(policy), 0
    later, soon = job.period + job.chunk, min(job.period, AHEAD) + min(job.chunk, AHEAD)
    answer = 0 if job.interval else min(job.max_new_tokens, AHEAD)
    max_entries = max(budgets) + later if fixed and job.interval else None
    if max_entries is not None:
        longest = max(max_entries, policy.at_most(config.num_layers)[1] * union + later)
    if max_entries is not None and max_entries <= FIXED:
        entries, page, every_row = max_entries, page_size(max_entries - later), True
    else:
        constant = fixed and max(budgets) <= FIXED
        held = max(budgets) if constant else max(map(min, job.lengths, budgets))
        # A text that goes on and on may become long: then pages that are read fast. (Pages of two sizes would double the shapes.)
        planned = FIXED if job.chunk or job.compiled else held + job.max_new_tokens
        page = page_size(held if job.interval or constant else planned)
        entries = max(held + soon + answer, LEAST_PAGES * page if job.compiled else 1)
        every_row = False
    # A fork that evicts moves all it holds to pages of its own; one that only appends copies the page it goes on in.
    own = entries if job.interval else min(entries, answer + soon + page)
    return Room(entries, max_entries, longest, page, job.forks * -(-own // page), every_row)


def _fixed(policy: Policy) -> bool:
    """Whether the budget is a number of entries."""
    return policy.budget is not None and not isinstance(policy.budget, float)


@dataclass
class Capacities:
    """How many pages of every list the graphs of evictions look at, as one engine has made them.

    Where heads keep different numbers the longest list is as long as the data says. A graph for every length would be made in
    the middle of answers, so a list goes through the smallest graph that has room for it, and where there is none is evicted
    eagerly, until PATIENCE says that a graph would have paid.
    """

    _made: dict[Hashable, list[int]] = field(default_factory=dict)
    _passed: dict[Hashable, int] = field(default_factory=dict)

    def known(self, key: Hashable) -> bool:
        """Whether there is a graph for caches of this kind."""
        return key in self._made

    def pages(self, key: Hashable, longest: int, planned: int, most: int) -> int | None:
        """Of every list to look at; None: the eviction had better be eager.

        Args:
            key: the kind of cache, and its policy.
            longest: pages of the longest list.
            planned: of a first graph, unless lists are longer.
            most: that a table has room for.

        >>> capacities = Capacities()
        >>> [capacities.pages("a", longest, 6, 100) for longest in (4, 6, 7)], capacities.pages("b", 13, 6, 100)
        ([6, 6, None], 16)
        """
        made = self._made.setdefault(key, [])
        if fits := [pages for pages in made if pages >= longest]:
            return min(fits)
        if made and self._passed.get(key, 0) < PATIENCE:
            self._passed[key] = self._passed.get(key, 0) + 1
            return None
        self._passed[key] = 0
        # Longer ones than planned grow longer still.
        made.append(min(planned if longest <= planned else pool_size(longest + longest // 4, 2), most))
        return made[-1]


def page_size(entries: int) -> int:
    """Slots per page: small caches waste less with small pages, large ones read faster with large pages."""
    return 128 if entries >= 512 else 32


def power(count: int) -> int:
    """The power of two that is not below.

    >>> [power(count) for count in (0, 1, 3, 8, 9)]
    [1, 1, 4, 8, 16]
    """
    return 1 << max(0, count - 1).bit_length()


def too_large(job: Job, policy: Policy, chunked: bool, wide: bool, asked: str) -> TooLargeError:
    """What to raise where memory is lacking: which of the job's numbers to lower.

    Args:
        chunked: the prompt is read in chunks, so that its length costs nothing.
        wide: the model would take less in a narrower dtype.
        asked: how much memory was lacking, in words, or "".
    """
    lower = []
    if policy.budget is None or not chunked:
        lower.append(f"the prompt ({max(job.lengths, default=0)} tokens)")
    if policy.budget is not None:
        lower.append(f"the budget ({policy.budget})")
    if job.interval is None:
        lower.append(f"max_new_tokens ({job.max_new_tokens})")
    elif job.interval > AHEAD:
        lower.append(f"the interval ({job.interval})")
    if len(job.lengths) > 1:
        lower.append(f"the rows ({len(job.lengths)})")
    if job.chunk > AHEAD:
        lower.append(f"the chunk ({job.chunk} tokens)")
    numbers = " or ".join([", ".join(lower[:-1]), lower[-1]] if lower[1:] else lower)
    other = ", or take a method with a budget" if policy.budget is None else ""
    dtype = ", or load the model in bfloat16" if wide else ""
    return TooLargeError(
        f"not enough memory for this prompt and answer under {policy.name}{asked}; lower {numbers}{other}{dtype}"
    )

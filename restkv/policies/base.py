"""The seam every eviction policy plugs into: options, and a score per entry. It neither selects nor evicts.

Letters: B batch rows, H query heads, K KV heads, G = H/K, C entries of one head (columns).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from einops import reduce, repeat
from torch import Tensor

from modeling.ranks import ALONE, Ranks
from modeling.text.characters import brief
from restkv import across
from restkv.budgets import ALLOCATIONS, LONGEST, Allocation
from restkv.errors import PolicyError
from restkv.observe import Observation
from restkv.probes import WINDOW, parse_probe
from restkv.refit import REFITS

TOO_MANY = 1 << 31  # for positions and numbers of entries, which are int32


@dataclass(frozen=True)
class Policy(ABC):
    """Options that every policy has. A new policy is a frozen dataclass with a `name` and an `importance(obs)`.

    Raises:
        PolicyError: an option is out of range, or window and sinks do not fit into the budget.
    """

    name: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ("kv", "query")  # the values `granularity` may take
    reductions: ClassVar[tuple[str, ...]] = ("mean", "max")  # the values `gqa` may take
    observes: ClassVar[bool] = True  # scores depend on queries, which may be those of any probe
    # What a score asks of heads that other ranks have: "nothing", "sums" (obs.ranks.sum), or None: nobody has said, and where
    # ranks share a model the policy is refused.
    exchanges: ClassVar[str | None] = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # preset name -> option values

    # Entries kept per KV head (per query head with granularity="query"), window and sinks included, as in the papers.
    # An int counts entries, a float in (0, 1] is the fraction of the prompt kept, None keeps everything.
    # A tuple gives one whole number per layer.
    budget: int | float | tuple[int, ...] | None
    window: int = 32  # the newest entries are always kept; their queries are the ones observed (see `observed`)
    sinks: int = 0  # the first positions of the text are always kept
    protect: tuple[tuple[int, int], ...] = ()  # [start, end) spans of positions that are always kept
    granularity: str = "kv"  # one kept set per "kv" head, or one per "query" head
    gqa: str = "mean"  # how the scores of a group's query heads become its KV head's (granularity="kv")
    interval: int | None = 128  # tokens between two evictions while decoding; None evicts after the prompt only
    # While tokens are appended, let a row's heads grow to this many entries before an eviction is worth it. What is read at
    # once, a dense prompt or the first chunk of a chunked one, comes back to its budget all the same.
    high_water: int | None = None
    # Tokens between two compactions while decoding; until then what is evicted is only masked. None: as measured (schedule.py).
    compact_every: int | None = None
    # How the budget is shared out: a name of ALLOCATIONS, or an Allocation. None: over the whole model ("global"), unless the
    # budget is one per layer.
    budget_by: str | Allocation | None = "uniform"
    # Whose queries the eviction after a prompt observes: "window", "prompt", "draft:N", "replay", "questions[:FILE]", or some of
    # them joined by "+" (restkv/probes.py). While decoding it is the last `window` queries.
    probe: str = WINDOW
    # What is fitted to the probe's queries once a prompt has been evicted, so that what is kept stands for all: "values", "bias"
    # (of every kept entry's attention logit) or "both" (restkv/refit.py).
    refit: str = "none"

    def __post_init__(self) -> None:
        self._require(_is_int(self.window) and self.window >= 0, "window", "give a whole number of at least 0")
        self._require(_is_int(self.sinks) and self.sinks >= 0, "sinks", "give a whole number of at least 0")
        self._require(
            self.interval is None or (_is_int(self.interval) and self.interval >= 1),
            "interval",
            "give the number of tokens between evictions, or None to evict after the prompt only",
        )
        self._require(
            self.high_water is None or (_is_int(self.high_water) and self.high_water >= 1),
            "high_water",
            "give the number of entries a head may grow to, or None",
        )
        self._require(
            self.compact_every is None or (_is_int(self.compact_every) and self.compact_every >= 1),
            "compact_every",
            "give the number of tokens between compactions, or None for what was measured to be best",
        )
        if self.budget_by is None:
            object.__setattr__(self, "budget_by", "uniform" if isinstance(self.budget, tuple) else "global")
        if isinstance(self.budget_by, str):
            self._one_of("budget_by", tuple(ALLOCATIONS))
            object.__setattr__(self, "budget_by", ALLOCATIONS[self.budget_by]())
        self._require(isinstance(self.budget_by, Allocation), "budget_by", f"choose from {', '.join(ALLOCATIONS)}")
        self._one_of("granularity", self.granularities)
        self._one_of("gqa", self.reductions)
        self._one_of("refit", REFITS)
        spans = self.protect if isinstance(self.protect, (tuple, list)) else ()
        valid = spans is self.protect and all(
            isinstance(s, (tuple, list)) and len(s) == 2 and all(map(_is_int, s)) and 0 <= s[0] < s[1] for s in spans
        )
        self._require(valid, "protect", "give (start, end) pairs of positions with 0 <= start < end")
        self._require(isinstance(self.probe, str), "probe", 'give text, such as "draft:8" or "replay"')
        self._require(
            (self.observes and "mass" not in self.needs) or self.probe == WINDOW,
            "probe",
            f"the score of {self.name} depends on no queries that one may choose; leave it at {WINDOW}",
        )
        self._require_refittable()
        try:
            parse_probe(self.probe)
        except PolicyError as error:
            raise PolicyError(f"{self.name}: {error}") from None
        object.__setattr__(self, "protect", tuple((start, end) for start, end in spans))
        self._check_budget()

    def _require_refittable(self) -> None:
        if self.refit == "none":
            return
        observing = self.observes and "mass" not in self.needs
        self._require(observing, "refit", f"{self.name} observes no queries to fit anything to; leave it at none")
        mend = 'query heads of a group share their values; choose granularity="kv", or leave it at none'
        self._require(self.granularity == "kv", "refit", mend)
        mend = "what is fitted holds for the phases that keys have, and slots change them; leave it at none"
        self._require(not self.slot_positions, "refit", mend)

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        if isinstance(self.budget, float):
            mend = "a float is the fraction of the prompt to keep, in (0, 1]; give entries as a whole number"
            self._require(0 < self.budget <= 1, "budget", mend)
            return
        budgets: tuple[Any, ...] = self.budget if isinstance(self.budget, tuple) and self.budget else (self.budget,)
        valid = all(_is_int(budget) and budget > 0 for budget in budgets)
        self._require(
            valid, "budget", "give at least 1 entry (one number, or a tuple of one per layer), or a fraction in (0, 1]"
        )
        single = not isinstance(self.budget, tuple)
        shared = self.allocation.across_layers or type(self.allocation).layers is not Allocation.layers
        mend = (
            f"budget_by {self.allocation.name} shares one number out among layers; give one, or choose uniform or adakv"
        )
        self._require(single or not shared, "budget", mend)
        least = self.window + self.sinks
        mend = f"window ({self.window}) + sinks ({self.sinks}) are always kept; give at least {least} or lower them"
        self._require(min(budgets) >= least, "budget", mend)

    @classmethod
    def window_within(cls, entries: int) -> dict[str, int]:
        """The option `window` for a budget of so many entries, where nobody has chosen one: the default, or half of the budget if
        that is less, or there would be nothing to choose among. Empty for a policy without a default.
        """
        default = next(option.default for option in fields(cls) if option.name == "window")
        return {} if default is MISSING else {"window": min(default, max(1, entries // 2))}

    def budget_for(self, length: int) -> int:
        """Entries per head (the mean over layers) for a prompt of `length` tokens.

        A fraction is rounded, to no less than window + sinks + 1.
        """
        assert self.budget is not None, "a policy without a budget evicts nothing"
        if isinstance(self.budget, float):
            return max(round(self.budget * length), self.window + self.sinks + 1)
        if isinstance(self.budget, tuple):
            return round(sum(self.budget) / len(self.budget))
        return self.budget

    def layer_budgets(self, length: int, num_layers: int) -> list[int]:
        """Entries per head of every layer for a prompt of `length` tokens.

        Raises:
            PolicyError: a tuple of budgets is not one per layer.
        """
        if isinstance(self.budget, tuple):
            mend = f"the model has {num_layers} layers; give one budget per layer"
            self._require(len(self.budget) == num_layers, "budget", mend)
            return list(self.budget)
        return self.allocation.layers(self.budget_for(length), self.window + self.sinks, num_layers, length)

    def at_most(self, num_layers: int) -> tuple[int, int]:
        """Entries per head that a budget of whole numbers comes to, whatever the prompt: the mean over layers, and of one layer.

        Raises:
            PolicyError: a tuple of budgets is not one per layer.
        """
        budget = self.budget
        if isinstance(budget, int):
            return self.allocation.at_most(budget, self.window + self.sinks, num_layers)
        budgets = self.layer_budgets(0, num_layers)
        return -(-sum(budgets) // num_layers), max(budgets)

    def even(self, num_layers: int) -> bool:
        """Whether all layers have the same budget, a number of entries, whatever the prompt."""
        number = self.budget is not None and not isinstance(self.budget, float)
        return number and len(set(self.layer_budgets(LONGEST, num_layers))) == 1

    def newest(self, budget: int) -> int:
        """How many of the newest entries a head that may keep `budget` keeps whatever their score."""
        return self.window

    @property
    def allocation(self) -> Allocation:
        """How the budget is shared out among layers and heads."""
        assert isinstance(self.budget_by, Allocation)
        return self.budget_by

    @property
    def slot_positions(self) -> bool:
        """Whether an entry's RoPE phase follows its rank in the cache instead of its position in the text."""
        return False

    @property
    def biased(self) -> bool:
        """Whether entries may have a bias (refit)."""
        return self.refit in ("bias", "both")

    @property
    def traceable(self) -> bool:
        """Whether evictions while decoding can be one compiled graph (restkv.masking): the highest scores stay where they are."""
        return self.budget is not None and type(self).keep is Policy.keep and not self.slot_positions

    @property
    def compares_heads(self) -> bool:
        """Whether an eviction has to know of all heads of a layer at once, or of all query heads that share an entry's list."""
        return self.exchanges != "nothing" or self.allocation.ragged or self.granularity == "query"

    @property
    def in_pieces(self) -> int:
        """Queries of a prompt that are scored one by one through Observation.run, where that is there; 0: none are."""
        return 0

    @property
    def observed(self) -> int:
        """How many of the last queries an eviction looks at while decoding."""
        return self.window

    @property
    def observed_prompt(self) -> int:
        """How many of a prompt's last queries the eviction after it looks at; more than there are means all."""
        return self.observed

    @property
    def needs(self) -> frozenset[str]:
        """What an observation must carry besides queries and entries: "root", "group_root", "mass", "rotary", "normed"."""
        return frozenset()

    def keep(self, obs: Observation, states: Sequence[Any] = ()) -> Tensor:
        """The entries that stay: bool [B, K, C] for granularity "kv", [B, H, C] for "query".

        A policy whose choice is not "the highest scores" overrides this. `obs.protected` and `obs.budget_B` are set.

        Args:
            states: what `start` returned for each row, for a policy whose choices depend on earlier ones. Layers come in
                order; a state is shared by all of them.
        """
        assert isinstance(obs.budget_B, Tensor)
        return across.select(obs.ranks, self.allocation, self.ranking(obs), obs.budget_B)

    def ranking(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """What an allocation selects by: score, position and protection, each [B, K, C] or (granularity "query") [B, H, C]."""
        assert obs.protected is not None
        score_BXC = self.score(obs)
        pos_BXC = obs.held if self.granularity == "query" else obs.pos
        heads = pos_BXC.shape[1] // obs.protected.shape[1]
        return score_BXC, pos_BXC, repeat(obs.protected, "B K C -> B (K G) C", G=heads)

    def start(self) -> Any:
        """State of a new row; `keep` is given one for every row. None: the policy has no memory."""
        return None

    def state_fits(self, state: Any) -> bool:
        """Whether `keep` can have left a row's memory like this: it was read from a file, its tensors like those of `start`."""
        return True

    def score(self, obs: Observation) -> Tensor:
        """How much each entry matters: higher stays.

        Only entries older than the observation window are compared; the window's own values mean nothing (it is kept).
        Padding and entries that a sliding-window layer will never see again score -inf.

        Returns:
            [B, K, C] for granularity "kv", [B, H, C] for "query"; float32 (float64 for a float64 observation).
        """
        score_BXC = self._seen_by_all(obs) if obs.looks else self.importance(obs)
        G = obs.group
        if self.granularity == "query":
            score_BXC = repeat(score_BXC, "B X C -> B (X G) C", G=obs.q.shape[1] // score_BXC.shape[1])
            pos_BXC, hidden_BXC = obs.held, repeat(obs.hidden, "B K C -> B (K G) C", G=G)
        else:
            if score_BXC.shape[1] != obs.k.shape[1]:
                score_BXC = reduce(score_BXC, "B (K G) C -> B K C", self.gqa, G=G)
            pos_BXC, hidden_BXC = obs.pos, obs.hidden
        return score_BXC.masked_fill((pos_BXC < 0) | hidden_BXC, -torch.inf)

    def _seen_by_all(self, obs: Observation) -> Tensor:
        """The most that any of obs.looks says of an entry."""
        most_BXC: Tensor | None = None
        for look in obs.looks:
            score_BXn = self.importance(look.of(obs))
            if most_BXC is None:
                most_BXC = score_BXn.new_full((*score_BXn.shape[:2], obs.pos.shape[-1]), -torch.inf)
            if look.at is None:
                most_BXC = torch.maximum(most_BXC, score_BXn[..., : most_BXC.shape[-1]])
            else:
                part_BXn = score_BXn[..., : len(look.at)]
                most_BXC = most_BXC.index_copy(-1, look.at, torch.maximum(most_BXC[..., look.at], part_BXn))
        assert most_BXC is not None
        return most_BXC

    @abstractmethod
    def importance(self, obs: Observation) -> Tensor:
        """What a subclass computes: [B, H, C] per query head, or [B, K, C] where all heads of a group agree."""

    def _require(self, condition: bool, option: str, mend: str) -> None:
        if not condition:
            value = getattr(self, option)
            if _largest(value) >= TOO_MANY:
                mend = f"give {'a number' if isinstance(value, int | float) else 'numbers'} below {TOO_MANY}"
            raise PolicyError(f"{self.name}: {option} {brief(value)}: {mend}")

    def _one_of(self, option: str, values: tuple[str, ...]) -> None:
        if getattr(self, option) is None and "none" in values:  # what an option written as none has been read as
            object.__setattr__(self, option, "none")
        self._require(getattr(self, option) in values, option, f"choose from {', '.join(values)}")


def require_policy(policy: object, ranks: Ranks = ALONE) -> Policy:
    """What is given as a policy.

    Args:
        ranks: that share the model.
    Raises:
        PolicyError: it is none, as the name of one; or nobody has said whether its heads can be on several ranks.
    """
    if isinstance(policy, Policy):
        if ranks.size > 1 and policy.exchanges is None:
            raise PolicyError(
                f"{policy.name}: nobody has said whether its score of a head looks at others, which {ranks.size} ranks share; "
                f'set its exchanges to "nothing" if it does not, or load without parallel'
            )
        return policy
    example = f"restkv.get_policy({policy if isinstance(policy, str) else 'restkv'!r}, budget=1024)"
    raise PolicyError(f"policy {policy!r} is no Policy; give one, such as {example}")


def _largest(value: object) -> float:
    """The largest number in an option's value."""
    if isinstance(value, tuple | list):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int | float) else 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and is_number(value)


def is_number(value: object) -> bool:
    """Whether an option's value is a number that tensors can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < TOO_MANY

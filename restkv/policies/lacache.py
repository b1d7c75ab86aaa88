"""LaCache (Shi et al., 2025, arXiv 2507.14204): ladders; neighbouring layers keep neighbouring stretches of the text.

Letters: B batch rows, K KV heads, C entries of one head (columns, or their ranks by age), N layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from restkv.budgets import Allocation
from restkv.observe import Observation
from restkv.policies.base import TOO_MANY
from restkv.policies.slots import Slotted


@dataclass
class LadderState:
    """Where one row's ladders stand: [2] int, the first slot not yet compacted and what the first overflow added to the size.

    Slots are counted without protected entries.
    """

    at: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.long))


class Ladder(NamedTuple):
    """Of `before` consecutive slots a layer keeps `after`."""

    before: int
    after: int


@dataclass(frozen=True)
class LaCache(Slotted):
    """Ladder-shaped eviction that never looks at content (docs/sources.md §2.8); the budget is the size of the cache.

    When a cache of c entries overflows, the oldest slots that have not been compacted yet are: of each `before` of them
    layer i keeps `after`, starting i mod (before - after + 1) slots in. When only the newest N slots are left, it starts
    over at the oldest, with ladders stretched as far as the overflow asks for: what is old gets thinner and thinner.
    With span S and overlap O, before = 1 + ceil((N - S) / (S - O)) and after = min(ceil(S / (S - O)), before). The first
    overflow adds (before - after) // 2 to c for good, so that the size between two compactions is c on average.

    Protected entries (sinks, `window`, spans) stand outside: ladders see the others, and what they leave of c.

    Where the released code fails, so that layers would differ in size, this does not: stretched rungs that would run past
    their ladder's end wrap around (there, entries are listed twice), and a last ladder that would run past the cache ends
    before the newest N slots (there, the newest tokens are lost or an index is out of range).

    Presets: "ppl" (cache 256, span 16, overlap 0, its perplexity script), "niah" (64 sinks, half the prompt). Without a
    span it is half of the layers, the published 16 of 32.
    """

    name: ClassVar[str] = "lacache"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ppl": {"budget": 256, "span": 16, "overlap": 0},
        "niah": {"budget": 0.5, "sinks": 64},
    }

    window: int = 0
    sinks: int = 4
    interval: int | None = 1
    span: int | None = None  # layers that keep a slot between them; None: half of all
    overlap: int = 0  # by how many layers the spans of neighbouring slots overlap

    def __post_init__(self) -> None:
        super().__post_init__()
        is_whole = isinstance(self.span, int) and not isinstance(self.span, bool)
        self._require(
            self.span is None or (is_whole and self.span >= 1), "span", "give a number of layers of at least 1, or None"
        )
        is_whole = isinstance(self.overlap, int) and not isinstance(self.overlap, bool)
        fits = is_whole and self.overlap >= 0 and (self.span is None or self.overlap < self.span)
        self._require(fits, "overlap", "give a number of layers of at least 0 and below the span")
        uniform = self.budget_by == Allocation() and not isinstance(self.budget, tuple)
        self._require(
            uniform, "budget_by", "ladders keep the same number in every layer; choose uniform and one budget"
        )

    def ladder(self, num_layers: int) -> Ladder:
        """What a ladder makes of how many slots in a model of so many layers.

        Raises:
            PolicyError: the spans cover all layers, so that nothing would ever be dropped.
        """
        span = max(num_layers // 2, 1) if self.span is None else self.span
        self._require(
            span < num_layers,
            "span",
            f"the model has {num_layers} layers; a span must be smaller, or None for their half",
        )
        self._require(self.overlap < span, "overlap", f"half of the model's layers are {span}; overlap by fewer")
        pace = span - self.overlap
        before = 1 - (span - num_layers) // pace
        after = min(-(-span // pace), before)
        mend = f"in a model of {num_layers} layers, ladders of span {span} then drop nothing; lower it"
        self._require(after < before, "overlap", mend)
        return Ladder(before, after)

    def layer_budgets(self, length: int, num_layers: int) -> list[int]:
        """The size of the cache in every layer; a fraction of the prompt is no less than ladders need.

        Raises:
            PolicyError: the cache has no room for protected entries, the newest N slots and a ladder.
        """
        fixed = self.window + _covered([(0, self.sinks), *self.protect])
        least = fixed + num_layers + self.ladder(num_layers).after
        size = self.budget_for(length)
        if isinstance(self.budget, float):
            size = max(size, least)
        mend = f"ladders need {least}: {fixed} protected entries, {num_layers} newest (one per layer) and a ladder's"
        self._require(size >= least, "budget", mend)
        return [size] * num_layers

    def start(self) -> LadderState:
        """A row whose cache has not overflowed yet."""
        return LadderState()

    def state_fits(self, state: LadderState) -> bool:
        """Both of its numbers count slots."""
        return bool(((state.at >= 0) & (state.at < TOO_MANY)).all())

    def keep(self, obs: Observation, states: Sequence[LadderState] = ()) -> Tensor:
        """The entries that stay, bool [B, K, C]; the last layer's call moves `states` on. Without states: a first overflow."""
        budget = self.budget if obs.budget_B is None else obs.budget_B
        assert isinstance(budget, (int, Tensor)), "the size of the cache must be a number of entries (obs.budget_B)"
        exists_BKC = obs.pos >= 0
        protected_BKC = exists_BKC & (obs.pos < self.sinks if obs.protected is None else obs.protected)
        free_BKC = exists_BKC & ~protected_BKC
        at_B2 = torch.stack([state.at.to(obs.pos.device) for state in states or [self.start()] * len(obs.pos)])
        # Every head holds the same positions, so the first one speaks for all.
        stays_BC, at_B2 = self._compact(
            obs, budget - protected_BKC[:, 0].sum(-1), free_BKC[:, 0].sum(-1), at_B2[:, 0], at_B2[:, 1]
        )
        if states and obs.layer == obs.num_layers - 1:
            for state, at in zip(states, at_B2, strict=True):
                state.at = at
        oldest_first_BKC = obs.pos.masked_fill(~free_BKC, torch.iinfo(obs.pos.dtype).max).argsort(dim=-1, stable=True)
        stays_BKC = torch.zeros_like(free_BKC).scatter(-1, oldest_first_BKC, stays_BC[:, None].expand_as(free_BKC))
        return protected_BKC | (free_BKC & stays_BKC)

    def _compact(
        self, obs: Observation, size_B: Tensor, length_B: Tensor, cursor_B: Tensor, extra_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which slots stay, bool [B, C], and the new cursor and extra size [B, 2] (docs/sources.md §2.8 items 1-4)."""
        N = obs.num_layers
        before, after = self.ladder(N)
        drop = before - after
        extra_B = extra_B.where(length_B <= size_B + extra_B, drop // 2)
        size_B = size_B + extra_B
        excess_B = (length_B - size_B).clamp_min(0)

        slot_BC = torch.arange(obs.pos.shape[-1], device=obs.pos.device).expand(len(obs.pos), -1)
        room_B = ((size_B - cursor_B - N) // after).clamp_min(0)  # ladders until the newest N slots
        over_B = excess_B > room_B * drop
        count_B = room_B.where(over_B, _ceil(excess_B, drop))
        stays_BC = self._rungs(obs, slot_BC, length_B, cursor_B, count_B, 1)
        cursor_B = cursor_B + count_B * after

        # Start over: what is still too much goes in a second pass over what the first one left, from the oldest slot on.
        left_B = (excess_B - room_B * drop).clamp_min(1)
        stretch_B = _ceil(left_B, ((size_B - N) // after).clamp_min(1) * drop)
        again_B = _ceil(left_B, stretch_B * (before - 1) + 1 - after) * over_B
        stays_BC = stays_BC & self._rungs(
            obs, stays_BC.cumsum(-1) - 1, length_B - count_B * drop, torch.zeros_like(cursor_B), again_B, stretch_B
        )
        cursor_B = (again_B * after).where(over_B, cursor_B)
        return stays_BC, torch.stack([cursor_B, extra_B], -1)

    def _rungs(
        self,
        obs: Observation,
        slot_BC: Tensor,
        length_B: Tensor,
        start_B: Tensor,
        count_B: Tensor,
        stretch: Tensor | int,
    ) -> Tensor:
        """Slots that stay when `count` ladders from slot `start` on drop theirs, bool [B, C].

        A stretched ladder has its rungs `stretch` slots apart. With before = 3, after = 2 and stretch 4, it is
        4 * (3 - 1) + 1 = 9 slots long; layer 0 keeps its slots 0 and 4, layer 3 keeps 3 and 7, layer 5 would keep 5 and 9,
        which is too far, and keeps 0 and 4.
        """
        before, after = self.ladder(obs.num_layers)
        size_B1 = torch.as_tensor(stretch * (before - 1) + 1, device=slot_BC.device).expand_as(start_B)[:, None]
        length_B1, start_B1, end_B1 = length_B[:, None], start_B[:, None], start_B[:, None] + count_B[:, None] * size_B1
        end_B1 = end_B1.where(end_B1 <= length_B1, length_B1 - obs.num_layers)
        inside_BC = (slot_BC >= start_B1) & (slot_BC < end_B1)
        place_BC = (slot_BC - start_B1) % size_B1
        own_BC = (end_B1 - slot_BC + place_BC).minimum(size_B1)  # slots of this ladder: the last one may be cut short
        apart_BC = ((own_BC - 1) // max(after - 1, 1)).minimum((size_B1 - 1) // (before - 1)).clamp_min(1)
        shift_BC = (obs.layer % (size_B1 - after + 1)) % (own_BC - apart_BC * (after - 1)).clamp_min(1)
        rung_BC = place_BC - shift_BC
        kept_BC = (rung_BC >= 0) & (rung_BC % apart_BC == 0) & (rung_BC // apart_BC < after)
        return kept_BC | ~inside_BC

    def importance(self, obs: Observation) -> Tensor:
        """1 for what a first overflow would leave, 0 for the rest, [B, K, C]. `keep` decides, not this."""
        return self.keep(obs).to(obs.dtype)


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """How many positions lie in at least one of the spans."""
    count = end = 0
    for start, stop in sorted(spans):
        start = max(start, end)
        if start < stop:
            count, end = count + stop - start, stop
    return count


def _ceil(x: Tensor, divisor: Tensor | int) -> Tensor:
    return -(-x // divisor)

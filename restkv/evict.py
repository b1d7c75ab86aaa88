"""Eviction: observe, choose, and let the losers go: after a prompt, and again and again while decoding.

Letters: B batch rows, H query heads, K KV heads, G = H / K, N layers, C entries (columns) of one head, L prompt length, D head
dim, W observed queries, R = B*K page lists, X heads with a kept set of their own (K, or H for granularity "query").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeling.cache import KVCache
from modeling.forward import Watch
from modeling.layers import Decoder
from modeling.pages import LayerCache
from modeling.sparse import BlockMap
from restkv import across
from restkv.budgets import Global
from restkv.compete import Competition
from restkv.masking import Entries, Shape, observe, over_limit
from restkv.mass import column_mass
from restkv.observe import Observation
from restkv.phrases import Phrases
from restkv.pieces import Pieces
from restkv.policies.base import Policy
from restkv.protection import check_protected, protected
from restkv.reading import Layer
from restkv.refit import References, references, refit
from restkv.roots import Roots
from restkv.seen import Reading, looks
from restkv.sizing import LEAST_COLUMNS, Capacities

UNLIMITED = 2**31 - 1  # entries: the budget of a policy without one


class Evictor:
    """A policy at work on the rows of one cache.

    Args:
        lengths: prompt length of every row; what fractional budgets are fractions of.
    Raises:
        PolicyError: the protected entries of a row do not fit into its budget.
    Attributes:
        budgets: [N][B] entries per head (UNLIMITED for a policy without budget).
        states: the policy's memory of each row.
        counted_B: [B] int32; queries before these positions have been counted into the entries' mass.
        scored: how prompts have been, "compiled" (by `pieces`) or "eager".
    """

    def __init__(self, model: Decoder, policy: Policy, roots: Roots, lengths: Sequence[int]) -> None:
        self.model, self.policy, self.roots, self.ranks = model, policy, roots, model.ranks
        layers = model.config.num_layers
        per_row = [
            [UNLIMITED] * layers if policy.budget is None else policy.layer_budgets(length, layers)
            for length in lengths
        ]
        for length, budgets in zip(lengths, per_row, strict=True):
            check_protected(policy, length, budgets)
        self.budgets = [list(column) for column in zip(*per_row, strict=True)]
        self.states = [policy.start() for _ in lengths]
        self.counted_B = torch.zeros(len(lengths), dtype=torch.int32, device=model.device)
        limits = [[max(budget, policy.high_water or 0) for budget in budgets] for budgets in self.budgets]
        newest = [self._newest(budgets) for budgets in self.budgets]
        (self._limit_NB,) = self._on_device(limits)
        # A tensor of its own for each layer: those that are parts of one look different to a graph.
        self._numbers = [self._on_device(*layer) for layer in zip(range(layers), self.budgets, newest, strict=True)]
        self._counted_2 = torch.zeros(2, dtype=torch.long, device=model.device)
        self.pieces = Pieces(False)
        self.scored: set[str] = set()
        self._competition: Competition | None = None  # of a prompt's layers for one budget, while it lasts

    def row(self, index: int) -> Evictor:
        """The evictor of one row alone (KVCache.row); states are shared with this one."""
        part = copy.copy(self)
        part.budgets = [[column[index]] for column in self.budgets]
        part.states = self.states[index : index + 1]
        row = slice(index, index + 1)
        part.counted_B, part._limit_NB = self.counted_B[row], self._limit_NB[:, row]
        return part

    def fork(self) -> Evictor:
        twin = copy.copy(self)
        twin.states, twin.counted_B = copy.deepcopy(self.states), self.counted_B.clone()
        twin._counted_2 = self._counted_2.clone()
        return twin

    # -- after a prompt

    def reading(self, ids: Sequence[int], phrases: Phrases) -> Reading:
        """What a one-row cache's prompt has to be read with: nothing besides where nothing will be evicted."""
        if all(budgets[0] >= len(ids) for budgets in self.budgets):
            return Reading()
        return Reading.of(self.policy.probe, ids, phrases)

    def watch_prompt(self, layer: int, length: int) -> tuple[Watch | None, Tensor | None]:
        """A callback for dense_layer that adds up the attention of all prompt queries, and the sums [X, L] it fills."""
        if "mass" not in self.policy.needs:
            return None, None
        config, window = self.model.config, self.model.blocks[layer].window
        per_query = self.policy.granularity == "query"
        mass_XL = torch.zeros(config.num_heads if per_query else config.num_kv_heads, length, device=self.model.device)

        def watch(q_THD: Tensor, k_KCD: Tensor, start: int, chosen: BlockMap | None) -> None:
            attention: dict[str, Any] = {"scale": config.attn_scale, "softcap": config.attn_softcap, "window": window}
            mass_HC = column_mass(q_THD, k_KCD, start, chosen=chosen, **attention)
            part_XC = mass_HC if per_query else mass_HC.unflatten(0, (config.num_kv_heads, -1)).mean(1)
            mass_XL[:, : part_XC.shape[1]] += part_XC

        return watch, mass_XL

    def store_prompt(self, cache: KVCache, layer: int, read: Layer, mass_XL: Tensor | None) -> None:
        """Write what the policy keeps of one layer's prompt into a one-row cache, and remember the last queries."""
        q_HWD, k_KLD, v_KLD, raw_KLD, sizes_SW, seen = read
        (heads, length), device = k_KLD.shape[:2], k_KLD.device
        pos_KL = torch.arange(length, device=device).expand(heads, length)
        budget, keep_1XL, obs = self.budgets[layer][0], None, None
        if budget < length:
            observed = min(max(self.policy.observed_prompt, 1), length)
            q_1HWD = q_HWD[None, :, -observed:]
            obs = self._observation(
                layer,
                q=q_1HWD,
                q_pos=torch.arange(length - q_1HWD.shape[2], length, device=device)[None],
                k=k_KLD[None],
                v=v_KLD[None],
                pos=pos_KL[None],
                budgets=[budget],
                next_pos_B=torch.tensor([length], device=device),
                mass=None if mass_XL is None else mass_XL[None],
            )
            if sizes_SW is not None:
                obs = replace(obs, sizes=sizes_SW[None, :, -observed:])
            obs = replace(
                obs,
                run=self._run(length),
                looks=looks(self.policy.probe, obs, seen, max(self.policy.observed_prompt, 1)),
            )
        if cache.ring_size:
            cache.remember(layer, 0, q_HWD, length - 1)
        mass_1XL = None if mass_XL is None else mass_XL[None]
        to_fit = None if obs is None else references(self.policy.refit, obs, seen, self.policy.probe)
        if obs is not None and self.policy.allocation.across_layers:
            self._compete(obs, mass_1XL, to_fit)
            return
        if obs is not None:
            keep_1XL = self.policy.keep(obs, self.states)
        keep_1KL, companions = self._stored(keep_1XL, mass_1XL, heads)
        if raw_KLD is not None:
            companions["raw"] = raw_KLD[None]
        here, target = {name: data[0] for name, data in companions.items()}, cache.layers[layer]
        if keep_1KL is None:
            target.append(0, k_KLD, v_KLD, pos_KL, None, here)
            return
        keep_KL = keep_1KL[0]
        k_nD, v_nD, pos_n = k_KLD[keep_KL], v_KLD[keep_KL], pos_KL[keep_KL]
        v_nD, fitted = refit(to_fit, keep_KL, k_nD, v_nD, pos_n)
        fitted |= {name: data[keep_KL] for name, data in here.items()}
        target.append_chosen(0, keep_KL, k_nD, v_nD, pos_n, fitted)
        self._moved(target, layer)

    def _run(self, length: int) -> Pieces | None:
        """What a layer's prompt is scored with, if it is compiled."""
        config = self.model.config
        pays = self.pieces.pay(length, self.policy.in_pieces * config.num_heads * config.head_dim)
        self.scored.add("compiled" if pays else "eager")
        return self.pieces if pays else None

    def _compete(self, obs: Observation, mass_1XL: Tensor | None, to_fit: References | None) -> None:
        """Let a layer's entries into the competition for the model's budget; earlier layers lose what they outrank."""
        allocation = self.policy.allocation
        assert isinstance(allocation, Global)
        if obs.layer == 0:
            self._competition = Competition(allocation.cascade(obs.num_layers, self.budgets[0][0]))
        assert self._competition is not None
        self._competition.add(obs, self.policy.ranking(obs), mass_1XL, to_fit)

    def prompt_done(self, cache: KVCache, length: int) -> None:
        """All layers of a one-row cache hold their share of the prompt."""
        if self._competition is not None:
            for layer, one in zip(cache.layers, self._competition.waiting, strict=True):
                _, companions = self._stored(one.keep_XL[None], one.mass_1XL, layer.heads)
                v_nD, fitted = refit(one.to_fit, one.any_KL, one.k_nD, one.v_nD, one.pos_n)
                fitted |= {name: data[0][one.any_KL] for name, data in companions.items()}
                layer.append_chosen(0, one.any_KL, one.k_nD, v_nD, one.pos_n, fitted)
        self._competition = None
        cache.next_pos.fill_(length)
        self.counted_B.fill_(length)
        self._align(cache)

    # -- while decoding

    def round(self, cache: KVCache, compact: bool, active: Sequence[bool] | None = None) -> bool:
        """Bring every head of every row back to its budget; True if a row was over it.

        Args:
            active: rows that go on; the others lose nothing. None: all of them.
            compact: reclaim the pages of what goes (and of what was only marked before); else mark the losers dead.
        Raises:
            PolicyError: protected spans that the text has grown into, or that the newest entries no longer cover, do not fit.
        """
        if self.policy.budget is None:
            return False
        over_B = [over and on for over, on in zip(self._over(cache), active or [True] * cache.rows, strict=True)]
        if "mass" not in self.policy.needs and not any(over_B):
            if compact:
                self.reclaim(cache)
            return False
        self._check_protected(cache, over_B)
        for index, (layer, obs, keep_BXC) in enumerate(self._choices(cache, over_B)):
            keep_BKC, companions = self._stored(keep_BXC, obs.mass, layer.heads)
            assert keep_BKC is not None
            keep_RC = keep_BKC.flatten(0, 1)
            flat = {name: data.flatten(0, 1) for name, data in companions.items()}
            if compact:
                layer.compact(keep_RC, flat)
            else:
                layer.mark(~keep_RC, flat)
            if any(over_B):
                self._moved(layer, index, torch.tensor(over_B, device=layer.used.device))
        self.counted_B.copy_(cache.next_pos)
        self._align(cache)
        return any(over_B)

    def _check_protected(self, cache: KVCache, over_B: Sequence[bool]) -> None:
        """Spans of the user's may have been grown into since."""
        if not self.policy.protect or not any(over_B):
            return
        for row, length in enumerate(cache.next_pos.tolist()):  # sync: once per eviction
            if over_B[row]:
                check_protected(self.policy, length, [budgets[row] for budgets in self.budgets])

    def reclaim(self, cache: KVCache) -> None:
        """Compact what earlier rounds marked: the pages of what is dead go back to the pool."""
        for layer in cache.layers:
            if (layer.live_counts().flatten() < layer.used).any():  # sync: once per compaction
                layer.compact()

    def _choices(self, cache: KVCache, over_B: Sequence[bool]) -> Iterator[tuple[LayerCache, Observation, Tensor]]:
        """Every layer with what was seen and what stays of it; rows that are not over their budget keep everything."""
        allocation = self.policy.allocation
        observed = (self._cached(cache, index, over_B) for index in range(len(cache.layers)))
        if not isinstance(allocation, Global):
            for layer, obs in zip(cache.layers, observed, strict=True):
                yield layer, obs, self.policy.keep(obs, self.states)
            return
        everything = list(observed)
        assert isinstance(everything[0].budget_B, Tensor)
        rankings = [self.policy.ranking(obs) for obs in everything]
        keeps = across.select_layers(self.ranks, allocation, rankings, everything[0].budget_B)
        yield from zip(cache.layers, everything, keeps, strict=True)

    def _over(self, cache: KVCache) -> list[bool]:
        """Which rows have outgrown their budget, or the policy's high-water mark: heads, layers or all, as they share it."""
        live_NBK = self.ranks.gather(torch.stack([layer.live_counts() for layer in cache.layers]), 2)
        return over_limit(self.policy.allocation, live_NBK, self._limit_NB).tolist()  # sync: once per eviction

    def _cached(self, cache: KVCache, index: int, over_B: Sequence[bool]) -> Observation:
        """The observation of one layer's pages."""
        budgets = [budget if over else UNLIMITED for budget, over in zip(self.budgets[index], over_B, strict=True)]
        budget_B, newest_B = self._on_device(budgets, self._newest(budgets))
        entries = self._entries(cache, index, self.model.blocks[index].window, index, budget_B, newest_B)
        slot_RC, _ = cache.layers[index].slots()
        return observe(self.policy, self._shape(cache, budgets), entries, slot_RC, cache.next_pos, self.counted_B)

    # -- while decoding, by masks alone

    def mask(
        self,
        cache: KVCache,
        active: Sequence[bool],
        active_B: Tensor,
        run: Callable[..., Tensor | None],
        capacities: Capacities,
    ) -> bool:
        """`round` in one graph, in which nothing moves and nothing is asked of the device.

        Args:
            active, active_B: rows that go on, as the host knows them and as the device does; the others lose nothing.
            run: masking.evict, or Engine.evict.
            capacities: of the graphs there are.
        Returns:
            False where it cannot be compiled, or is not worth it; nothing has been done then.
        Raises:
            PolicyError: see `round`.
        """
        if self.policy.protect and any(active):
            self._check_protected(cache, [on and over for on, over in zip(active, self._over(cache), strict=True)])
        pages = self._pages(cache, capacities)
        if pages is None:
            return False
        for layer in cache.layers:
            layer.own()
        # Constants of a graph, where no prompt changes them.
        known = self.budgets[0] if self.policy.even(self.model.config.num_layers) else None
        shape = self._shape(cache, known, pages)
        layers = [
            self._entries(cache, index, layer.reach, *numbers)
            for index, (layer, numbers) in enumerate(zip(cache.layers, self._numbers, strict=True))
        ]
        found_2 = run(self.policy, shape, layers, cache.next_pos, self.counted_B, active_B, self._limit_NB)
        if found_2 is None:
            return False
        for layer in cache.layers:
            layer.thinned = True
        self.count(*found_2)
        return True

    # -- what there was of it

    def count(self, over: bool | Tensor, live: int | Tensor) -> None:
        """Count an eviction, if a row was over its budget, and note the most entries that a head held then."""
        self._counted_2[0] += over
        self._counted_2[1] = self._counted_2[1].clamp(min=live)

    @property
    def evictions(self) -> int:
        """How often a row was brought back to its budget while decoding."""
        return int(self._counted_2[0])  # sync: figures for a person

    @property
    def max_live(self) -> int:
        """Most entries that a head held when an eviction was due."""
        return int(self._counted_2[1])  # sync: figures for a person

    # -- what all share

    def _entries(
        self,
        cache: KVCache,
        index: int,
        reach: int | Tensor | None,
        layer: int | Tensor,
        budget_B: Tensor,
        newest_B: Tensor,
    ) -> Entries:
        needs, rope = self.policy.needs, self.model.blocks[index].rope
        return Entries.of(
            cache.layers[index],
            ring=cache.queries[index],
            root=self.roots.get(index, needs),
            reach=reach,
            rotary=self.model.rotaries[rope] if "rotary" in needs else None,
            number=layer,
            budget_B=budget_B,
            newest_B=newest_B,
        )

    def _shape(self, cache: KVCache, budgets: Sequence[int] | None, pages: int = 0) -> Shape:
        config = self.model.config
        return Shape(
            heads=config.num_kv_heads,
            page=cache.layers[0].pool.page,
            pages=pages,
            ring_size=cache.ring_size,
            softmax_scale=config.attn_scale,
            softcap=config.attn_softcap,
            num_layers=config.num_layers,
            budgets=None if budgets is None else tuple(budgets),
            ranks=self.ranks,
        )

    def kind(self, cache: KVCache) -> Hashable:
        """All that makes graphs of evictions differ, but for how long lists are."""
        layer = cache.layers[0]
        return repr(self.policy), cache.rows, cache.ring_size, layer.pool.num_pages, layer.pool.page, layer.max_pages

    def _pages(self, cache: KVCache, capacities: Capacities) -> int | None:
        """Of every list for a graph to look at, or None (see Capacities)."""
        layers, pages = cache.layers, cache.planned_pages
        longest = max(len(one) for layer in layers for one in layer.lists)
        least = LEAST_COLUMNS // layers[0].pool.page
        if self.policy.allocation.ragged:  # heads that keep a little more than others are the rule
            pages = max(pages + pages // 4, pages + 1, least)
        elif not pages:
            pages = layers[0].max_pages
        return capacities.pages(self.kind(cache), longest, pages, layers[0].max_pages)

    def _newest(self, budgets: Sequence[int]) -> list[int]:
        return [self.policy.newest(budget) for budget in budgets]

    def _on_device(self, *numbers: Any) -> list[Tensor]:
        return [torch.tensor(one, device=self.model.device) for one in numbers]

    def _stored(
        self, keep_BXC: Tensor | None, mass_BXC: Tensor | None, heads: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What to store: entries per KV head [B, K, C] (None: all) and the companions [B, K, C, ...]."""
        companions: dict[str, Tensor] = {}
        if mass_BXC is not None:
            companions["mass"] = mass_BXC.unflatten(1, (heads, -1)).transpose(2, 3)
        if keep_BXC is None or self.policy.granularity == "kv":
            return keep_BXC, companions
        keep_BKGC = keep_BXC.unflatten(1, (heads, -1))
        companions["keep"] = keep_BKGC.transpose(2, 3)
        return keep_BKGC.any(2), companions  # entries live once per KV head: the union of its query heads' sets

    def _moved(self, layer: LayerCache, index: int, rows_B: Tensor | None = None) -> None:
        """Where slots are the positions, the survivors get the phase of their new rank (rows_B: in these rows)."""
        if self.policy.slot_positions:
            layer.rerotate(self._rotary(index), rows_B)

    def _align(self, cache: KVCache) -> None:
        """Where slots are the positions, the next token's phase is the number of entries its row still has."""
        if self.policy.slot_positions:
            cache.lag.copy_(cache.next_pos - cache.layers[0].live_counts()[:, 0])

    def _rotary(self, layer: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        rotary = self.model.rotaries[self.model.blocks[layer].rope]
        return lambda pos_BT: rotary(pos_BT, pos_BT.amax(-1) + 1, torch.float32)

    def _observation(
        self,
        layer: int,
        *,
        q: Tensor,
        q_pos: Tensor,
        k: Tensor,
        v: Tensor,
        pos: Tensor,
        budgets: Sequence[int],
        next_pos_B: Tensor,
        keep: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Observation:
        config = self.model.config
        return Observation(
            q=q,
            q_pos=q_pos,
            k=k,
            v=v,
            pos=pos,
            root=self.roots.get(layer, self.policy.needs),
            softmax_scale=config.attn_scale,
            softcap=config.attn_softcap,
            sliding_window=self.model.blocks[layer].window,
            layer=layer,
            num_layers=config.num_layers,
            keep=keep,
            mass=mass,
            protected=protected(self.policy, pos, self._on_device(self._newest(budgets))[0], next_pos_B),
            budget_B=torch.tensor(budgets, device=pos.device),
            budgets=tuple(budgets),
            rotary=self._rotary(layer) if "rotary" in self.policy.needs else None,
            among=self.ranks,
        )

"""What must hold at every eviction, whoever chooses: a watch over the engine that checks each round against it.

Nothing here knows a score. From what a cache held before a round, what it holds after it, and the policy's options follow
how many entries stay where, which must be among them, and what may never happen to the others.

Letters: B batch rows, K KV heads, G query heads per KV head, X heads with a kept set of their own, D head dim, n entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from modeling.cache import KVCache
from modeling.pages import LayerCache
from restkv.evict import Evictor
from restkv.policies import Policy


class Entries(NamedTuple):
    """The live entries of one list (a KV head of a row), in the order of their slots."""

    pos: list[int]
    k: Tensor  # [n, D] after RoPE; before it where entries are renumbered
    v: Tensor  # [n, D]
    seen: list[list[bool]] | None  # G times n: whether a query head still has the entry; None: all do
    bias: Tensor  # [n], what is added to their logits


Snapshot = list[list[Entries]]  # [layer][list]


def entries_of(layer: LayerCache) -> list[Entries]:
    """Read a layer's lists page by page, as the docstring of modeling/pages.py lays them out."""
    pool, lists = layer.pool, []
    keys = pool.companions.get("raw", pool.k[0, 0])
    keep = pool.companions.get("keep")
    bias = pool.companions.get("bias", torch.zeros(len(pool.pos)))
    for pages, used in zip(layer.lists, layer.used.tolist(), strict=True):
        slots = (torch.tensor(pages, dtype=torch.long)[:, None] * pool.page + torch.arange(pool.page)).flatten()[:used]
        slots = slots[pool.pos[slots] >= 0]
        seen = None if keep is None else keep[slots].T.tolist()
        lists.append(Entries(pool.pos[slots].tolist(), keys[slots], pool.v[0, 0, slots], seen, bias[slots]))
    return lists


def snapshot(cache: KVCache) -> Snapshot:
    return [entries_of(layer) for layer in cache.layers]


def positions(lists: Sequence[Entries]) -> list[list[int]]:
    """Positions per KV head or, where query heads have sets of their own, per query head."""
    out: list[list[int]] = []
    for entries in lists:
        lines = [[True] * len(entries.pos)] if entries.seen is None else entries.seen
        out.extend([p for p, has in zip(entries.pos, line, strict=True) if has] for line in lines)
    return out


@dataclass
class Watch:
    """What has been seen so far.

    Attributes:
        prompts: dense prompts (or first chunks) stored.
        rounds: evictions tried.
        compactions: evictions, due ones without effect included, that reclaimed pages.
        cut: rows that lost entries, prompts included.
        hidden: entries of sliding-window layers that were out of sight when a choice was made.
        kept: positions after each of them in order, prompts (one row) and rounds: [event][row][layer][head].
        full: for each prompt to come, what a full cache holds of it; its rows must be stored bit for bit.
        turned: rows whose keys were rotated anew by the round going on, one list per layer.
        active: rows that went on at the last round.
    """

    prompts: int = 0
    rounds: int = 0
    compactions: int = 0
    cut: int = 0
    hidden: int = 0
    kept: list[list[list[list[list[int]]]]] = field(default_factory=list)
    full: list[Snapshot] = field(default_factory=list)
    turned: list[list[bool]] = field(default_factory=list)
    active: Sequence[bool] = ()

    def prompt(self, evictor: Evictor, cache: KVCache, length: int) -> None:
        """A prompt was stored in a cache of one row."""
        after = snapshot(cache)
        sets = evictor.policy.granularity == "query" and evictor.policy.budget is not None  # one per query head
        group = evictor.model.config.group if sets else 1
        before = [[list(range(length))] * (len(lists) * group) for lists in after]
        over = [budgets[0] < length for budgets in evictor.budgets]
        if self.full:
            full = self.full[self.prompts % len(self.full)]
            for mine, theirs in zip(after, full, strict=True):
                for stored, original in zip(mine, theirs, strict=True):
                    assert torch.equal(stored.k, original.k[stored.pos]), "keys of a prompt were changed"
                    same = torch.equal(stored.v, original.v[stored.pos]) and not stored.bias.any()
                    assert same or evictor.policy.refit != "none", "values of a prompt were changed"
        self.prompts += 1
        self.kept.append([[positions(lists) for lists in after]])
        self._row(evictor, 0, before, self.kept[-1][0], over, length)
        self._stored(evictor, cache, after, [True], compacted=True)

    def round(
        self,
        evictor: Evictor,
        cache: KVCache,
        before: Snapshot,
        dead: bool,
        compact: bool,
        active: Sequence[bool],
    ) -> None:
        """An eviction was due; rows that are not active lose nothing. dead: there were marked entries before it."""
        after, heads, kept, asked, overs = snapshot(cache), cache.layers[0].heads, [], dead, []
        for layer, (old, new) in enumerate(zip(before, after, strict=True)):
            for mine, theirs in zip(new, old, strict=True):
                at = {p: i for i, p in enumerate(theirs.pos)}
                index = [at[p] for p in mine.pos]  # a KeyError: an entry from nowhere
                assert torch.equal(mine.k, theirs.k[index]), f"layer {layer}: keys changed"
                assert torch.equal(mine.v, theirs.v[index]), f"layer {layer}: values changed"
                assert torch.equal(mine.bias, theirs.bias[index]), f"layer {layer}: biases changed"
        for row, length in enumerate(cache.next_pos.tolist()):
            lists = slice(row * heads, (row + 1) * heads)
            over = [active[row] and self._over(evictor, row, [layer[lists] for layer in before])] * len(before)
            overs.append(over[0])
            asked = asked or any(over)
            kept.append([positions(layer[lists]) for layer in after])
            self._row(evictor, row, [positions(layer[lists]) for layer in before], kept[-1], over, length)
        turns = len(before) if evictor.policy.slot_positions and any(overs) else 0
        assert self.turned == [overs] * turns, "only what has lost entries is renumbered: rotating again rounds again"
        self.rounds += 1
        self.compactions += compact
        self.kept.append(kept)
        self.active = active
        self._stored(evictor, cache, after, active, compacted=compact and asked)
        _pages_read(cache)

    def reclaimed(self, evictor: Evictor, cache: KVCache) -> None:
        """What rounds had only marked was compacted."""
        self.compactions += 1
        self._stored(evictor, cache, snapshot(cache), self.active, compacted=True)

    def _over(self, evictor: Evictor, row: int, before: Snapshot) -> bool:
        """Whether a row has outgrown its budget (then all its layers are chosen from anew): heads, layers or all of it."""
        policy = evictor.policy
        if policy.budget is None:
            return False
        excess = []
        for lists, budgets in zip(before, evictor.budgets, strict=True):
            sizes, limit = [len(entries.pos) for entries in lists], max(budgets[row], policy.high_water or 0)
            excess.append(sum(sizes) - limit * len(sizes) if policy.allocation.ragged else max(sizes) - limit)
        return (sum(excess) if policy.allocation.across_layers else max(excess)) > 0

    def _row(
        self,
        evictor: Evictor,
        row: int,
        before: list[list[list[int]]],
        after: list[list[list[int]]],
        over: Sequence[bool],
        length: int,
    ) -> None:
        """One row's choice; before and after are [layer][head][entry]."""
        policy = evictor.policy
        self.cut += before != after
        budgets = [column[row] for column in evictor.budgets]
        remembers, fewer = policy.start() is not None, chooses_itself(policy)
        if any(over):
            self._chosen(evictor, row, before, after, length)
        ties: list[tuple[bool, bool]] = []  # per head: kept something hidden, dropped something visible
        spent, allowed, entries = [0] * len(before), [0] * len(before), [0] * len(before)
        for layer, window in enumerate(evictor.model.config.windows):
            pairs = []
            for old, new in zip(before[layer], after[layer], strict=True):
                assert new == sorted(set(new)), "positions must increase along a list"
                kept = set(new)
                assert kept <= set(old), "an entry from nowhere"
                if not over[layer]:
                    assert new == old, "nobody asked for an eviction"
                    continue
                always = protected(policy, old, length, budgets[layer])
                assert always <= kept, f"protected entries were evicted: {sorted(always - kept)}"
                if not policy.allocation.ragged and not remembers:
                    whose = f"layer {layer}: a head of {len(old)} entries kept"
                    _count(len(new), min(len(old), max(budgets[layer], len(always))), fewer, whose)
                gone = {p for p in old if window is not None and p <= length - window}
                self.hidden += len(gone)
                pairs.append((bool((kept & gone) - always), bool(set(old) - kept - gone)))
                spent[layer] += len(new)
                allowed[layer] += max(budgets[layer], len(always))
                entries[layer] += len(old)
            if policy.allocation.ragged and not policy.allocation.across_layers:
                if exact_counts(policy):
                    _count(spent[layer], min(entries[layer], allowed[layer]), fewer, f"the heads of layer {layer} kept")
                pairs = [(any(h for h, _ in pairs), any(v for _, v in pairs))]
            ties.extend(pairs)
        if policy.allocation.across_layers:  # Global, which has no option `exact`
            _count(sum(spent), min(sum(entries), sum(allowed)), fewer, "the heads of all layers kept")
            ties = [(any(h for h, _ in ties), any(v for _, v in ties))]
        if not fewer:  # what chooses for itself may look at ranks alone, as ladders do
            assert (True, True) not in ties, "kept what a sliding window has hidden, and dropped what it has not"

    def _chosen(
        self, evictor: Evictor, row: int, before: list[list[list[int]]], after: list[list[list[int]]], length: int
    ) -> None:
        """A row's eviction was due; before and after are [layer][head][entry]. For those who know more of a policy."""

    def _above(self, policy: Policy, layers: int) -> int | None:
        """What a head may hold beyond its budget; None: nobody knows, as of a policy that remembers how much it may keep."""
        return None if policy.start() is not None else 0

    def _stored(
        self, evictor: Evictor, cache: KVCache, after: Snapshot, active: Sequence[bool], compacted: bool
    ) -> None:
        """Slots and bytes: after a compaction, at most the budget's and one page per head."""
        policy, config = evictor.policy, evictor.model.config
        above = self._above(policy, config.num_layers)
        if not compacted:
            return
        allowed = 0
        for layer, lists, budgets in zip(cache.layers, after, evictor.budgets, strict=True):
            assert layer.used.tolist() == [len(entries.pos) for entries in lists], "dead entries after a compaction"
            page = layer.pool.page
            assert layer.pages_held == sum(-(-len(entries.pos) // page) for entries in lists), "pages held for nothing"
            per_head = config.group if policy.granularity == "query" else 1  # disjoint sets, at worst
            for row, length in enumerate(cache.next_pos.tolist()):
                most = max(budgets[row], policy.high_water or 0) + (above or 0)
                always = len(protected(policy, range(length), length, budgets[row]))
                entries = max(most * per_head, always) if active[row] else length
                allowed += layer.heads * (entries * layer.pool.slot_bytes + layer.pool.page_bytes)
        if policy.budget is not None and above is not None:
            assert cache.allocated_bytes <= allowed, f"{cache.allocated_bytes} bytes of pages, where {allowed} do"


def _pages_read(cache: KVCache) -> None:
    """Attention reads the pages of every list, each once, but for some on which nothing lives and nothing will be written."""
    for layer in cache.layers:
        page, pos = layer.pool.page, layer.pool.pos.view(-1, layer.pool.page)
        lines = zip(layer.lists, layer.listed.tolist(), layer.used.tolist(), layer.skipped.tolist(), strict=True)
        for pages, listed, used, skipped in lines:
            read = listed[: len(pages) - skipped]  # now, and as the list fills up
            unread = sorted(set(pages) - set(read))
            assert sorted([*read, *unread]) == sorted(pages) and len(unread) == skipped, "attention has another list"
            assert set(unread) <= set(pages[: used // page]), "a page that is still written to would not be read"
            assert not (pos[unread] >= 0).any(), "living entries would not be read"


def protected(policy: Policy, held: Sequence[int], length: int, budget: int) -> set[int]:
    """Those of the positions `held` that no score can evict from a row of `length` tokens."""
    return {
        p
        for p in held
        if p < policy.sinks or p >= length - policy.newest(budget) or any(a <= p < b for a, b in policy.protect)
    }


def chooses_itself(policy: Policy) -> bool:
    """Whether a policy's entries are chosen by a `keep` of its own, which may keep fewer than its budget allows."""
    return type(policy).keep is not Policy.keep


def exact_counts(policy: Policy) -> bool:
    """Whether its allocation spends a budget to the last entry: an option of those whose heads share one."""
    return not policy.allocation.ragged or getattr(policy.allocation, "exact", True) is True


def _count(kept: int, due: int, fewer: bool, whose: str) -> None:
    assert kept <= due if fewer else kept == due, f"{whose} {kept}, where {due} are due"


Watching = TypeVar("Watching", bound=Watch)


@contextmanager
def watched(watch: Watching) -> Iterator[Watching]:
    """While this lasts, every prompt stored and every eviction of any session is checked by `watch`."""
    prompt_done, rerotate = Evictor.prompt_done, LayerCache.rerotate
    round_, mask_, reclaim_ = Evictor.round, Evictor.mask, Evictor.reclaim
    within: list[bool] = []  # a round, which may reclaim

    def done(evictor: Evictor, cache: KVCache, length: int) -> None:
        prompt_done(evictor, cache, length)
        watch.prompt(evictor, cache, length)

    def evict(evictor: Evictor, cache: KVCache, compact: bool, active: Sequence[bool] | None = None) -> bool:
        before = snapshot(cache)
        live = [[len(entries.pos) for entries in lists] for lists in before]
        dead = [layer.used.tolist() for layer in cache.layers] != live
        watch.turned.clear()
        within.append(True)
        over = round_(evictor, cache, compact, active)
        within.clear()
        watch.round(evictor, cache, before, dead, compact, active or [True] * cache.rows)
        return over

    def mask(evictor: Evictor, cache: KVCache, active: Sequence[bool], *others: Any) -> bool:
        before = snapshot(cache)
        watch.turned.clear()
        masked = mask_(evictor, cache, active, *others)
        if masked and any(active):
            watch.round(evictor, cache, before, False, False, active)
        else:
            assert list(map(positions, snapshot(cache))) == list(map(positions, before)), "nobody was to lose anything"
        return masked

    def reclaim(evictor: Evictor, cache: KVCache) -> None:
        reclaim_(evictor, cache)
        if not within:
            watch.reclaimed(evictor, cache)

    def turn(layer: LayerCache, rotary: Callable[..., Any], rows_B: Tensor | None = None) -> None:
        watch.turned.append([True] * layer.rows if rows_B is None else rows_B.tolist())
        rerotate(layer, rotary, rows_B)

    with (
        patch.object(Evictor, "prompt_done", done),
        patch.object(Evictor, "round", evict),
        patch.object(Evictor, "mask", mask),
        patch.object(Evictor, "reclaim", reclaim),
        patch.object(LayerCache, "rerotate", turn),
    ):
        yield watch

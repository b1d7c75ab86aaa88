"""Pages against plain Python lists: a long random life of caches, forks included, and the rules one by one.

Letters: B batch rows, T new tokens, K KV heads, G query heads per KV head, R = B*K lists, C columns, D head dim.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from make.effort import many
from make.small import VOCAB, small_model
from modeling.cache import UNBOUNDED, KVCache
from modeling.forward import extend, step
from modeling.pages import LayerCache
from modeling.pool import EMPTY, SINK_PAGE, PagePool

CPU = torch.device("cpu")
PAGE, GROUP, D = 4, 2, 4
COMPANIONS = {"keep": ((GROUP,), torch.bool), "mass": ((), torch.float32)}


def cache_of(windows=(None,), rows=1, heads=1, entries=4, **options) -> KVCache:
    """A cache of small float32 pages."""
    shape = {"num_heads": heads * GROUP, "num_kv_heads": heads, "head_dim": D, "dtype": torch.float32, "device": CPU}
    return KVCache.create(windows=windows, rows=rows, entries=entries, page=PAGE, **{**shape, **options})


def layer_of(pages: int, rows: int = 1, heads: int = 1, companions=None) -> LayerCache:
    return LayerCache(PagePool(pages, PAGE, D, torch.float32, CPU, companions), rows, heads)


def fill(cache: LayerCache, row: int, count: int, first: int = 0) -> None:
    """Append entries with positions first, first + 1, ... whose key is the position and whose value is minus that."""
    pos_C = torch.arange(first, first + count)
    k_KCD = pos_C.float()[None, :, None].expand(cache.heads, -1, D)
    cache.append(row, k_KCD, -k_KCD, pos_C)


def write(cache: KVCache, pos_BT: list[list[int]]) -> None:
    """Run the tokens of these positions through a model, which writes their keys."""
    layer = cache.layers[0]
    model = small_model(windows=(None,) * len(cache.layers), kv_heads=layer.heads, group=GROUP, head_dim=D)
    pos = torch.tensor(pos_BT, dtype=torch.int32)
    extend(model, cache, torch.ones_like(pos).long(), pos)


def positions(cache: LayerCache) -> list[list[int]]:
    """Live positions of every list, in the order they are stored."""
    return [[p for p in row if p >= 0] for row in cache.slots()[1].tolist()]


class Entry(NamedTuple):
    """What a list's model knows of one entry."""

    pos: int
    k: Tensor
    v: Tensor
    mass: float
    bits: list[bool]


Lives = list[list[list[Entry]]]  # of every layer, list and place


class Life(RuleBasedStateMachine):
    """A cache of two layers over one pool that starts too small, and its forks; every list has a model, a list of Entry."""

    @initialize(rows=st.integers(1, 2), heads=st.integers(1, 2), seed=st.integers(0, 2**32))
    def create(self, rows, heads, seed):
        cache = cache_of((None, None), rows, heads, companions=COMPANIONS, shared=True)
        self.pool = cache.layers[0].pool
        self.caches: list[tuple[KVCache, Lives]] = [(cache, [[[] for _ in range(rows * heads)] for _ in cache.layers])]
        self.next_pos = 0
        # Blocks that add nothing to the residual stream: every layer's keys follow from the token and its position alone.
        self.model = small_model(windows=(None, None), kv_heads=heads, group=GROUP, head_dim=D)
        for block in self.model.blocks:
            block.o_proj.weight.zero_()
            block.down_proj.weight.zero_()
        for layer in (0, 1):  # a life that starts with something to lose
            self.append(layer, seed + layer, 10, True)
        self.fork(0, seed, 2)

    def pick(self, which):
        """A cache, one of its layers, and that layer's models."""
        cache, models = self.caches[which // 2 % len(self.caches)]
        return cache.layers[which % 2], models[which % 2]

    def fresh_positions(self, count):
        self.next_pos += count
        return range(self.next_pos - count, self.next_pos)

    @rule(which=st.integers(0, 9), seed=st.integers(0, 2**32), count=st.integers(0, 10), given=st.booleans())
    def append(self, which, seed, count, given):
        layer, lists = self.pick(which)
        dice, random_ = random.Random(seed), torch.Generator().manual_seed(seed)
        row, shape_KC = dice.randrange(layer.rows), (layer.heads, count)
        k_KCD, v_KCD = (torch.randn(*shape_KC, D, generator=random_) for _ in range(2))
        pos_KC = torch.tensor([list(self.fresh_positions(count)) for _ in range(layer.heads)]).view(shape_KC)
        pos_KC[torch.rand(shape_KC, generator=random_) < 0.2] = EMPTY
        keep_KC = torch.rand(shape_KC, generator=random_) < 0.7 if dice.random() < 0.7 else None
        mass_KC = torch.rand(shape_KC, generator=random_)
        bits_KCG = torch.rand(*shape_KC, GROUP, generator=random_) < 0.5
        layer.append(row, k_KCD, v_KCD, pos_KC, keep_KC, {"mass": mass_KC, "keep": bits_KCG} if given else None)
        if not given:
            mass_KC, bits_KCG = torch.zeros_like(mass_KC), torch.ones_like(bits_KCG)
        stays_KC = pos_KC >= 0 if keep_KC is None else (pos_KC >= 0) & keep_KC
        for head, c in torch.nonzero(stays_KC).tolist():
            at = head, c
            entry = Entry(int(pos_KC[at]), k_KCD[at], v_KCD[at], float(mass_KC[at]), bits_KCG[at].tolist())
            lists[row * layer.heads + head].append(entry)

    @rule(
        which=st.integers(0, 9),
        seed=st.integers(0, 2**32),
        tokens=st.integers(1, 6),
        ahead=st.integers(0, 9),
        by_row=st.booleans(),
    )
    def decode(self, which, seed, tokens, ahead, by_row):
        """All layers write; padding is trailing and has no room reserved, whole rows may be finished."""
        cache, models = self.caches[which // 2 % len(self.caches)]
        dice = random.Random(seed)
        real = [dice.choice([0, dice.randint(0, tokens), tokens]) for _ in range(cache.rows)]
        ids_BT = torch.tensor([[dice.randrange(VOCAB) for _ in range(tokens)] for _ in real])
        pos_T = torch.tensor(self.fresh_positions(tokens), dtype=torch.int32)
        pos_BT = pos_T.where(torch.arange(tokens) < torch.tensor(real)[:, None], EMPTY)
        parts = [(cache.row(b), [b]) for b in range(cache.rows)] if by_row else [(cache, list(range(cache.rows)))]
        for part, rows in parts:
            part.reserve([real[b] + ahead * (real[b] > 0) for b in rows])
            step(self.model, ids_BT[rows], pos_BT[rows], part.lag, part.views(), part.queries, 0, "sdpa")
        cache.refresh()
        x_BTE, rotary = self.model.embed(ids_BT), self.model.rotary(pos_BT, pos_BT.amax(-1) + 1)
        for block, lists in zip(self.model.blocks, models, strict=True):
            _, k_BTKD, v_BTKD = block.project(x_BTE, *rotary[block.rope])
            for index, entries in enumerate(lists):
                b, h = divmod(index, cache.layers[0].heads)
                for t in range(real[b]):
                    entries.append(Entry(int(pos_T[t]), k_BTKD[b, t, h], v_BTKD[b, t, h], 0.0, [True] * GROUP))

    @rule(
        which=st.integers(0, 9),
        seed=st.integers(0, 2**32),
        share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        replaced=st.booleans(),
    )
    def mark(self, which, seed, share, replaced):
        layer, lists = self.pick(which)
        shape_RC, random_ = (len(lists), max(map(len, lists))), torch.Generator().manual_seed(seed)
        drop_RC, mass_RC = torch.rand(shape_RC, generator=random_) < share, torch.rand(shape_RC, generator=random_)
        layer.mark(drop_RC, {"mass": mass_RC} if replaced else None)
        for r, entries in enumerate(lists):
            for c, entry in enumerate(entries):
                mass = float(mass_RC[r, c]) if replaced else entry.mass
                entries[c] = entry._replace(pos=EMPTY if drop_RC[r, c] else entry.pos, mass=mass)

    @rule(
        which=st.integers(0, 9),
        seed=st.integers(0, 2**32),
        chosen=st.booleans(),
        replaced=st.booleans(),
        by_row=st.booleans(),
    )
    def compact(self, which, seed, chosen, replaced, by_row):
        layer, lists = self.pick(which)
        random_, parts = torch.Generator().manual_seed(seed), [(layer, lists)]
        if by_row:
            K = layer.heads
            parts = [(layer.row(b), lists[b * K : b * K + K]) for b in range(layer.rows)]
        for part, rows in parts:
            shape_RC = len(rows), max(map(len, rows))
            keep_RC = torch.rand(shape_RC, generator=random_) < (0.5 if chosen else 2)
            mass_RC = torch.rand(shape_RC, generator=random_)
            part.compact(keep_RC if chosen else None, {"mass": mass_RC} if replaced else None)
            for r, entries in enumerate(rows):
                if replaced:
                    entries[:] = [e._replace(mass=float(mass_RC[r, c])) for c, e in enumerate(entries)]
                entries[:] = [e for c, e in enumerate(entries) if e.pos >= 0 and keep_RC[r, c]]
                assert len(part.lists[r]) == -(-len(entries) // PAGE), "a compacted list has no page to spare"
        layer.refresh()

    @rule(which=st.integers(0, 9), seed=st.integers(0, 2**32), rows=st.integers(1, 3))
    def fork(self, which, seed, rows):
        if len(self.caches) < 5:
            cache, models = self.caches[which // 2 % len(self.caches)]
            chosen = random.Random(seed).choices(range(cache.rows), k=rows)
            heads, free = cache.layers[0].heads, self.pool.free_pages
            lists = [row * heads + head for row in chosen for head in range(heads)]
            self.caches.append((cache.fork(chosen), [[list(model[r]) for r in lists] for model in models]))
            assert self.pool.free_pages == free, "a fork takes no pages"

    @rule(which=st.integers(0, 9), seed=st.integers(0, 2**32), count=st.integers(1, 10))
    def clear(self, which, seed, count):
        layer, lists = self.pick(which)
        layer.clear()
        for entries in lists:
            entries.clear()
        self.append(which, seed, count, False)

    @rule(which=st.integers(0, 9))
    def free(self, which):
        if len(self.caches) > 1:
            self.caches.pop(which // 2 % len(self.caches))[0].free()

    @invariant()
    def caches_hold_what_their_models_hold(self):
        pool = self.pool
        layers = [pair for cache, models in self.caches for pair in zip(cache.layers, models, strict=True)]
        for layer, lists in layers:
            counts = [len(entries) for entries in lists]
            assert layer.lengths() == counts
            slot_RC, pos_RC = layer.slots()
            padded = [[e.pos for e in entries] + [EMPTY] * (max(counts) - len(entries)) for entries in lists]
            assert pos_RC.tolist() == padded
            assert not slot_RC[torch.arange(max(counts)) >= torch.tensor(counts)[:, None]].any()
            live_n = slot_RC[pos_RC >= 0]
            live = [e for entries in lists for e in entries if e.pos >= 0]
            assert layer.live_counts().flatten().tolist() == [sum(e.pos >= 0 for e in entries) for entries in lists]
            if live:
                assert torch.allclose(pool.k[0, 0, live_n], torch.stack([e.k for e in live]), atol=1e-6)
                assert torch.allclose(pool.v[0, 0, live_n], torch.stack([e.v for e in live]), atol=1e-6)
            assert pool.companions["mass"][live_n].tolist() == [e.mass for e in live]
            assert pool.companions["keep"][live_n].tolist() == [e.bits for e in live]

    @invariant()
    def pages_are_never_lost_and_never_doubly_owned(self):
        pool = self.pool
        layers = [layer for cache, _ in self.caches for layer in cache.layers]
        held = [page for layer in layers for pages in layer.lists for page in pages]
        assert SINK_PAGE not in held
        assert pool.free_pages + len(set(held)) == pool.num_pages - 1
        assert all(pool.is_shared(page) == (held.count(page) > 1) for page in held)
        for layer in layers:
            assert all(len(pages) == len(set(pages)) for pages in layer.lists)
            table_RP = layer.view().table.tolist()
            assert all(row[: len(pages)] == pages for pages, row in zip(layer.lists, table_RP, strict=True))

    @invariant()
    def a_slot_has_a_position_only_while_it_is_alive_on_a_list(self):
        alive = set()
        for cache, _ in self.caches:
            for layer in cache.layers:
                slot_RC, pos_RC = layer.slots()
                alive |= set(slot_RC[pos_RC >= 0].tolist())
        assert set(torch.nonzero(self.pool.pos >= 0).flatten().tolist()) == alive

    def teardown(self):
        if hasattr(self, "caches"):
            for cache, _ in self.caches:
                cache.free()
            assert self.pool.free_pages == self.pool.num_pages - 1
            assert (self.pool.pos == EMPTY).all()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=many(60, 2), stateful_step_count=40)


class LongLife(Life):
    pass


TestLongLife = pytest.mark.slow(LongLife.TestCase)
TestLongLife.settings = settings(max_examples=many(300), stateful_step_count=80)


def test_an_entry_lies_where_its_page_says():
    """The worked example of modeling/pages.py: with page 4 and pages [7, 2], entry 5 is in slot 9."""
    cache = layer_of(8)
    pool = cache.pool
    assert sorted(pool.take(8)) == list(range(1, 9))
    pool.release([2])
    pool.release([7])
    fill(cache, 0, 6)
    assert cache.lists == [[7, 2]]
    slot_RC, pos_RC = cache.slots()
    assert slot_RC.tolist() == [[28, 29, 30, 31, 8, 9]]
    assert pos_RC.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert pool.k[0, 0, 9].tolist() == [5.0] * D


def test_a_pool_starts_at_zero_and_grows_with_everything_in_it():
    cache = layer_of(1, companions=COMPANIONS)
    pool = cache.pool
    assert not any(t.any() for t in (pool.k, pool.v, *pool.companions.values()))
    assert (pool.pos == EMPTY).all()
    fill(cache, 0, 3)
    before = pool.num_pages
    fill(cache, 0, 9, first=3)
    assert pool.num_pages > before
    sizes = {pool.k.shape[2], pool.v.shape[2], len(pool.pos), *map(len, pool.companions.values())}
    assert sizes == {pool.num_pages * PAGE}
    assert positions(cache) == [list(range(12))]
    slot_RC, _ = cache.slots()
    assert pool.k[0, 0, slot_RC[0], 0].tolist() == list(range(12))


def test_pages_cannot_be_released_twice_or_shared_when_free():
    pool = layer_of(2).pool
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="free"):
        pool.share(pages)


def test_a_new_entry_inherits_nothing_from_the_slot_it_gets():
    """A decode step writes no mass; the page's former owner had some."""
    cache = cache_of(companions=COMPANIONS)
    (layer,), pool = cache.layers, cache.layers[0].pool
    ones_1CD = torch.ones(1, 8, D)
    layer.append(0, ones_1CD, ones_1CD, torch.arange(8), companions={"mass": torch.full((1, 8), 7.0)})
    layer.clear()
    write(cache, [[3]])
    slot_RC, _ = layer.slots()
    assert pool.pos[slot_RC].tolist() == [[3]]
    assert pool.companions["mass"][slot_RC].tolist() == [[0.0]]
    assert pool.companions["keep"][slot_RC].tolist() == [[[True] * GROUP]]


@pytest.mark.parametrize("act", ["append", "write", "mark", "compact", "clear"])
@pytest.mark.parametrize("actor", ["parent", "fork"])
def test_what_one_side_of_a_fork_does_the_other_never_sees(act, actor):
    parent = cache_of(rows=2, heads=2, entries=12)
    fill(parent.layers[0], 0, 6)
    fill(parent.layers[0], 1, 3)
    fork = parent.fork([1, 0, 0])
    assert positions(fork.layers[0]) == [[0, 1, 2]] * 2 + [list(range(6))] * 4
    actors = (parent, fork) if actor == "parent" else (fork, parent)
    mine, other = (cache.layers[0] for cache in actors)
    want, keys = positions(other), other.pool.k[0, 0, other.slots()[0]].clone()
    if act == "append":
        fill(mine, 1, 3, first=50)
    elif act == "write":
        write(actors[0], [[50, 51]] * mine.rows)
    elif act == "mark":
        mine.mark(mine.slots()[1] < 5)
    elif act == "compact":
        mine.compact(mine.slots()[1] % 2 == 0)
    else:
        mine.clear()
    assert positions(other) == want
    assert torch.equal(other.pool.k[0, 0, other.slots()[0]], keys)
    assert positions(mine) != want


def test_two_rows_of_one_fork_part_when_they_write():
    parent = layer_of(20)
    fill(parent, 0, 6)
    twins = parent.fork([0, 0])
    assert twins.lists[0] == twins.lists[1] == parent.lists[0]
    fill(twins, 1, 1, first=77)
    assert positions(twins) == [list(range(6)), [*range(6), 77]]
    assert twins.lists[0] == parent.lists[0], "who does not write keeps sharing"
    assert twins.lists[1][0] == parent.lists[0][0], "full pages stay shared"
    twins.mark(torch.tensor([[False] * 7, [True] * 7]))
    assert positions(twins) == [list(range(6)), []]
    assert positions(parent) == [list(range(6))]


def test_bytes_count_keys_values_positions_and_companions():
    cache = cache_of([None, 5], 2, 2, entries=10, dtype=torch.bfloat16, companions=COMPANIONS)
    slot = 2 * D * 2 + 4 + GROUP + 4  # k and v in bfloat16, pos, one keep bit per query head of the group, mass
    kv = torch.zeros(2, 5, D, dtype=torch.bfloat16)
    keep = torch.tensor([[True] * 5, [True, False, False, False, False]])
    cache.layers[1].append(1, kv, kv, torch.arange(5), keep)
    assert cache.live_bytes == 6 * slot
    assert cache.allocated_bytes == 3 * PAGE * slot
    pages = 2 * 2 * 3 + 1  # rows, heads, pages for 10 entries; one that swallows padding
    assert cache.reserved_bytes == 2 * pages * PAGE * slot
    cache.layers[1].mark(cache.layers[1].slots()[1] == 0)
    assert cache.live_bytes == 4 * slot
    assert cache.allocated_bytes == 3 * PAGE * slot
    cache.free()
    assert cache.live_bytes == cache.allocated_bytes == 0


def test_every_layer_carries_its_own_window_when_any_has_one():
    def reaches(windows):
        return [view.reach if view.reach is None else view.reach.tolist() for view in cache_of(windows).views()]

    assert reaches([None, None]) == [None, None]
    assert reaches([7, None, 3]) == [[7], [UNBOUNDED], [3]]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_ring_returns_the_last_queries_oldest_first(window):
    """Row 0 has a prompt longer than the window, row 1 a shorter one; a fork keeps what it had."""
    cache = cache_of(rows=2, ring_size=window)

    def queries(first, last):
        """[H, n, D] whose numbers are the positions first ... last, halved in head 1."""
        return (torch.arange(first, last + 1) / torch.tensor([[1.0], [2.0]]))[..., None].expand(-1, -1, D)

    last = [10, 1]
    for row in (0, 1):
        cache.remember(0, row, queries(max(0, last[row] - window + 1), last[row]), last[row])
        cache.next_pos[row] = last[row] + 1
    fork = cache.fork([1, 0])
    cache.remember(0, 0, queries(11, 11), 11)
    cache.next_pos[0] += 1
    for holder, ends in ((cache, [11, 1]), (fork, [1, 10])):
        q_BHWD, q_pos_BW = holder.recent(0)
        assert q_BHWD.shape == (2, GROUP, window, D)
        for row, end in enumerate(ends):
            assert q_pos_BW[row].tolist() == [max(p, EMPTY) for p in range(end - window + 1, end + 1)]
            real_W = q_pos_BW[row] >= 0
            assert torch.equal(q_BHWD[row][:, real_W], queries(0, end)[:, -int(real_W.sum()) :])


def test_padding_may_point_beyond_the_whole_pool():
    """A compiled chunk has one width, and room is reserved for its real tokens alone."""
    cache = cache_of()
    model = small_model(windows=(None,), kv_heads=1, group=GROUP, head_dim=D)
    pos_1T = torch.tensor([[0, 1, *[EMPTY] * 60]], dtype=torch.int32)
    cache.reserve([2])
    assert cache.layers[0].pool.num_pages * PAGE < 60
    step(model, torch.ones(1, 62).long(), pos_1T, cache.lag, cache.views(), cache.queries, 0, "sdpa")
    assert positions(cache.layers[0]) == [[0, 1]]

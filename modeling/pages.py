"""Pages: which slots of a pool hold the entries of the KV cache.

Letters: B batch rows, K KV heads, R = B*K lists of one layer (list r belongs to row r // K, head r % K), G query heads per KV
head, D head dim, P pages of a pool, S = P * page slots, M pages a list may hold, C entries of the longest list.

A list of page numbers says which slots of the pool (pool.py) belong to one head of one row: entry n of list r lies in slot
`pages[r][n // page] * page + n % page`. With page = 4 and pages[r] = [7, 2], entry 5 is in slot 2*4 + 1 = 9.
Attention reads the pool through these lists (masks.py), so heads, rows and layers may keep different numbers of entries, and
moving or dropping entries never changes a shape. Pages left without a living entry stay on the list, which says where the next
entry goes, but go to the end of its copy that attention reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.pool import EMPTY, SINK_PAGE, PagePool, read
from modeling.rope import rotate


class LayerView(NamedTuple):
    """What one layer's forward pass reads and writes: only tensors, so that a compiled graph takes them as inputs.

    k, v [1,1,S,D]; pos [S] int32; table [R,P] int32, whose first `M` columns of each row are that list's pages (row stride M:
    rows overlap, and the columns past a list's end are never read); used [R] int32: entries written, dead ones included;
    listed [R,P] int32: the same pages as attention reads them, which leaves out the last skipped [R] int32 of those in use;
    keep [S,G] bool or None: which query heads of the group may see the entry. reach [1] int32 or None: the layer's sliding
    window (a large number where it has none); None when no layer of the model has one. It is a tensor so
    that layers with different windows share one region of nested_compile_region. On torch 2.13 that region tells apart numbers
    a mask function captured, but not what it reads from a captured layer: there the first layer's window would serve them all.
    raw [S,D] or None: keys before RoPE, for caches whose entries are re-rotated to their slot's rank. bias [S] float32 or None:
    what is added to every logit of an entry.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    table: Tensor
    used: Tensor
    listed: Tensor
    skipped: Tensor
    keep: Tensor | None
    reach: Tensor | None
    raw: Tensor | None
    bias: Tensor | None


def columns(table_RM: Tensor, used_R: Tensor, pages: int, page: int) -> Tensor:
    """Slot of every column of the first `pages` pages of every list, [R, pages * page] int64; past a list's end 0.

    Args:
        table_RM: the lists' pages.
        used_R: entries written to each.
    """
    offset_p = torch.arange(page, device=table_RM.device)
    slot_RC = (table_RM[:, :pages, None].long() * page + offset_p).flatten(1)
    column_C = torch.arange(pages * page, device=table_RM.device)
    return slot_RC.masked_fill(column_C >= used_R[:, None], SINK_PAGE * page)


def listed_pages(table_RM: Tensor, used_R: Tensor, pos_RC: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The lists as attention reads them: pages that are full of dead entries come last, and how many those are.

    Args:
        table_RM, used_R: see columns.
        pos_RC: positions of the first C // page pages' columns, -1 where nothing lives.
    Returns:
        [R, C // page] and [R], int32.
    """
    pages = pos_RC.shape[1] // page
    number_M = torch.arange(pages, device=pos_RC.device)
    written_RM = number_M < (used_R // page)[:, None]  # the others have room for what comes
    dead_RM = written_RM & (pos_RC < 0).view(len(pos_RC), pages, page).all(-1)
    order_RM = dead_RM.to(torch.int8).argsort(dim=-1, stable=True)
    return table_RM[:, :pages].gather(1, order_RM), dead_RM.sum(-1, dtype=torch.int32)


def recent(ring: Tensor, next_pos_B: Tensor, ring_size: int) -> tuple[Tensor, Tensor]:
    """The last W queries that a ring holds, oldest first: q [B, H, W, D] after RoPE and their positions [B, W] int64, -1 where
    none was.
    """
    position_BW = next_pos_B[:, None] + torch.arange(-ring_size, 0, device=ring.device)
    row_B1 = torch.arange(len(next_pos_B), device=ring.device)[:, None]
    q_BWHD = ring[row_B1 * (ring_size + 1) + position_BW % ring_size]
    return q_BWHD.transpose(1, 2), position_BW.clamp(min=EMPTY).long()


class LayerCache:
    """The page lists of one layer over a pool that may be its own or shared with other layers.

    Args:
        pool: where the pages come from.
        rows, heads: B and K; the cache has R = B*K lists.
        ragged: lists of one row may differ in length, or those of other layers over the same pool.
        reach: see LayerView.
    Attributes:
        thinned: entries may have died since the lists were made: attention need not read all of their pages.
        max_pages: M. It follows from the pool, so that pools of one size make tables of one shape: all of it where one list may
            hold everything, else a head's share of it.
    """

    def __init__(
        self, pool: PagePool, rows: int, heads: int, ragged: bool = False, reach: Tensor | None = None
    ) -> None:
        self.pool = pool
        self.reach = reach
        self.rows, self.heads = rows, heads
        self.ragged = ragged
        self.max_pages = 0
        self.thinned = False
        self.lists: list[list[int]] = [[] for _ in range(rows * heads)]
        self.used = torch.zeros(rows * heads, dtype=torch.int32, device=pool.pos.device)
        self.skipped = torch.zeros_like(self.used)
        self._table = self._listed = torch.zeros(0, dtype=torch.int32, device=pool.pos.device)
        self.refresh()

    # -- what the forward pass sees

    def view(self) -> LayerView:
        pool = self.pool
        if len(self._table) != len(self.lists) * self.max_pages + pool.num_pages:
            self.refresh()
        # The CPU lowering of flex wants one column per page of the pool; rows M apart cost R*M + P integers instead of R*P.
        shape, strides = (len(self.lists), pool.num_pages), (self.max_pages, 1)
        table, listed = (numbers.as_strided(shape, strides) for numbers in (self._table, self._listed))
        keep, raw, bias = (pool.companions.get(name) for name in ("keep", "raw", "bias"))
        return LayerView(pool.k, pool.v, pool.pos, table, self.used, listed, self.skipped, keep, self.reach, raw, bias)

    @property
    def table(self) -> Tensor:
        """[R, M] int32: the lists' pages, where the next entry goes last."""
        return self._square(self._table)

    @property
    def listed(self) -> Tensor:
        """[R, M] int32: the same pages as attention reads them (LayerView)."""
        return self._square(self._listed)

    def _square(self, numbers: Tensor) -> Tensor:
        return numbers[: len(self.lists) * self.max_pages].view(len(self.lists), self.max_pages)

    def refresh(self, changed: slice = slice(None)) -> None:
        """Copy the lists (or those that changed) to the device table, made anew when a list or the pool has outgrown it."""
        usable = self.pool.num_pages - 1
        share = usable if self.ragged else -(-usable // self.heads)
        self.max_pages = max(self.max_pages, share, *(len(pages) for pages in self.lists))
        size = len(self.lists) * self.max_pages + self.pool.num_pages
        if len(self._table) != size:
            self._table = torch.zeros(size, dtype=torch.int32, device=self.pool.pos.device)
            self._listed = torch.zeros_like(self._table)
            changed = slice(None)  # every list begins elsewhere
        longest = max(map(len, self.lists[changed]))  # a table with room for a whole pool is mostly empty
        fresh = [pages + [SINK_PAGE] * (longest - len(pages)) for pages in self.lists[changed]]
        fresh_Rm = torch.tensor(fresh, dtype=torch.int32, device=self._table.device)
        for table_RM in (self.table, self.listed):
            table_RM[changed, :longest] = fresh_Rm
            table_RM[changed, longest:] = SINK_PAGE
        if self.thinned:
            self.list_pages()

    def list_pages(self) -> None:
        """Bring `listed` and `skipped` up to date with what is alive."""
        pages = max(map(len, self.lists))
        slot_RC = columns(self.table, self.used, pages, self.pool.page)
        listed_RM, skipped_R = listed_pages(self.table, self.used, read(self.pool.pos, slot_RC), self.pool.page)
        self.listed[:, :pages].copy_(listed_RM)
        self.skipped.copy_(skipped_R)

    def lengths(self) -> list[int]:
        """Entries written to each list, dead ones included. Reads the device: once per interval, never per token."""
        return self.used.tolist()  # sync: pages are handed out on the host

    # -- writing

    def reserve(self, extra: int | Sequence[int], lists: slice = slice(None)) -> None:
        """Give every list (or those of a slice) room for `extra` more entries, so that the next steps need no host's help."""
        page, some = self.pool.page, self.lists[lists]
        extras = [extra] * len(some) if isinstance(extra, int) else extra
        for pages, used, more in zip(some, self.lengths()[lists], extras, strict=True):
            if more and used % page and self.pool.is_shared(pages[used // page]):
                pages[used // page] = self.pool.duplicate(pages[used // page])
            missing = -(-(used + more) // page) - len(pages)
            if missing > 0:
                pages.extend(self.pool.take(missing))
        self.refresh(lists)

    def append(
        self,
        row: int,
        k_KCD: Tensor,
        v_KCD: Tensor,
        pos_KC: Tensor,
        keep_KC: Tensor | None = None,
        companions: dict[str, Tensor] | None = None,
    ) -> None:
        """Append entries to the K lists of one row, in column order.

        Args:
            k_KCD, v_KCD: keys (after RoPE) and values [K, C, D].
            pos_KC: original positions [K, C] (or [C], the same for all heads); columns with pos < 0 are skipped.
            keep_KC: bool [K, C]; False columns are skipped.
            companions: name -> [K, C, ...] values for the pool's companions; those not given become zero (True for `keep`).
        """
        pos_KC = pos_KC.expand(self.heads, -1)
        keep_KC = pos_KC >= 0 if keep_KC is None else keep_KC & (pos_KC >= 0)
        flat = {name: data[keep_KC] for name, data in (companions or {}).items()}
        self.append_chosen(row, keep_KC, k_KCD[keep_KC], v_KCD[keep_KC], pos_KC[keep_KC], flat)

    def append_chosen(
        self, row: int, keep_KC: Tensor, k_nD: Tensor, v_nD: Tensor, pos_n: Tensor, companions: dict[str, Tensor]
    ) -> None:
        """Like `append`, for the n entries marked in keep_KC alone, head after head."""
        lists = slice(row * self.heads, (row + 1) * self.heads)
        self._scatter(lists, keep_KC, k_nD, v_nD, pos_n, companions)

    def _scatter(
        self, lists: slice, keep_XC: Tensor, k_nD: Tensor, v_nD: Tensor, pos_n: Tensor, companions: dict[str, Tensor]
    ) -> None:
        """Append the n entries marked in keep_XC (row-major order) to the X lists of the slice."""
        counts = keep_XC.sum(-1)
        self.reserve(counts.tolist(), lists)  # sync: pages are handed out on the host, once per layer and eviction
        pool, page = self.pool, self.pool.page
        entry_XC = self.used[lists, None] + keep_XC.cumsum(-1) - 1
        list_X1 = torch.arange(len(self.lists), device=keep_XC.device)[lists, None]
        entry_n, list_n = entry_XC[keep_XC], list_X1.expand_as(keep_XC)[keep_XC]
        slot_n = self._table[list_n * self.max_pages + entry_n // page].long() * page + entry_n % page
        pool.k.index_copy_(2, slot_n, k_nD[None, None])
        pool.v.index_copy_(2, slot_n, v_nD[None, None])
        pool.pos.index_copy_(0, slot_n, pos_n.to(pool.pos.dtype))
        for name, slab in pool.companions.items():
            slab[slot_n] = companions.get(name, name == "keep")
        self.used[lists] += counts.to(self.used.dtype)

    # -- reading

    def slots(self) -> tuple[Tensor, Tensor]:
        """Slot of every entry of every list and its position: [R, C] int64 and [R, C] int32; padding has slot 0, pos -1."""
        longest, page = max(self.lengths()), self.pool.page
        slot_RC = columns(self.table, self.used, -(-longest // page), page)[:, :longest]
        return slot_RC, read(self.pool.pos, slot_RC)

    # -- evicting

    def own(self) -> None:
        """Copy every page that is shared, so that this cache may write anywhere in its lists."""
        if not self.pool.shared_pages:  # looking at every page takes a while
            return
        copied = False
        for pages in self.lists:
            for index, number in enumerate(pages):
                if self.pool.is_shared(number):
                    pages[index] = self.pool.duplicate(number)
                    copied = True
        if copied:
            self.refresh()

    def mark(self, drop_RC: Tensor, companions: dict[str, Tensor] | None = None) -> None:
        """Evict = mask: entries of `slots()` with drop = True lose their position; nothing moves.

        `companions` replaces companion values: name -> [R, C, ...] over the columns of `slots()`.
        """
        self.own()
        slot_RC, pos_RC = self.slots()
        for name, data in (companions or {}).items():
            self.pool.companions[name][slot_RC[pos_RC >= 0]] = data[pos_RC >= 0]
        self.pool.pos[slot_RC[drop_RC]] = EMPTY
        self.thinned = True
        self.list_pages()

    def compact(self, keep_RC: Tensor | None = None, companions: dict[str, Tensor] | None = None) -> None:
        """Compact = reclaim: live entries (those with keep = True, if given) move to the front of fresh pages, in order.

        The old pages go back to the pool, or stay with whoever shares them. `companions` replaces companion values: name ->
        [R, C, ...] over the columns of `slots()`.
        """
        slot_RC, pos_RC = self.slots()
        keep_RC = pos_RC >= 0 if keep_RC is None else keep_RC & (pos_RC >= 0)
        slot_n = slot_RC[keep_RC]
        k_nD, v_nD = read(self.pool.k[0, 0], slot_n), read(self.pool.v[0, 0], slot_n)
        carried = {name: read(slab, slot_n) for name, slab in self.pool.companions.items()}
        carried.update({name: data[keep_RC] for name, data in (companions or {}).items()})
        self.clear()
        self._scatter(slice(None), keep_RC, k_nD, v_nD, pos_RC[keep_RC], carried)

    def clear(self) -> None:
        """Drop every entry and give the pages back."""
        self.pool.release(number for pages in self.lists for number in pages)
        for pages in self.lists:
            pages.clear()
        self.used.zero_()
        self.skipped.zero_()
        self.thinned = False

    def rerotate(self, rotary: Callable[[Tensor], tuple[Tensor, Tensor]], rows_B: Tensor | None = None) -> None:
        """Give every live key (bool [B]: of some rows) the RoPE phase of its rank in its list, from the unrotated `raw`."""
        self.own()
        slot_RC, pos_RC = self.slots()
        live_RC = pos_RC >= 0
        turned_RC = live_RC if rows_B is None else live_RC & rows_B.repeat_interleave(self.heads)[:, None]
        cos_RCD, sin_RCD = rotary(live_RC.cumsum(-1) - 1)
        raw_RC1D = read(self.pool.companions["raw"], slot_RC)[
            :, :, None
        ]  # cos and sin make the product float32 at least
        k_RCD = rotate(raw_RC1D, cos_RCD, sin_RCD)[:, :, 0].to(self.pool.k.dtype)
        self.pool.k.index_copy_(2, slot_RC[turned_RC], k_RCD[turned_RC][None, None])

    # -- sharing

    def row(self, index: int) -> LayerCache:
        """A window onto one row: what is done to it is done to this cache, which sees it after `refresh`."""
        lists = slice(index * self.heads, (index + 1) * self.heads)
        part = LayerCache(self.pool, 1, self.heads, self.ragged, self.reach)
        part.lists = self.lists[lists]
        part.used, part.skipped, part.thinned = self.used[lists], self.skipped[lists].clone(), self.thinned
        part.refresh()
        return part

    def fork(self, rows: Sequence[int]) -> LayerCache:
        """A cache whose row i continues row rows[i] of this one; both share the pages until one of them writes."""
        twin = LayerCache(self.pool, len(rows), self.heads, self.ragged, self.reach)
        sources = [row * self.heads + head for row in rows for head in range(self.heads)]
        twin.used, twin.thinned = self.used[sources].clone(), self.thinned
        twin.skipped = torch.zeros_like(twin.used)
        used = self.lengths()
        for mine, source in zip(twin.lists, sources, strict=True):
            mine.extend(self.lists[source][: -(-used[source] // self.pool.page)])
            self.pool.share(mine)
        twin.refresh()
        return twin

    # -- accounting

    @property
    def pages_held(self) -> int:
        return sum(len(pages) for pages in self.lists)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pages on this layer's lists."""
        return self.pages_held * self.pool.page_bytes

    def live_counts(self) -> Tensor:
        """Live entries per list [B, K] int64."""
        _, pos_RC = self.slots()
        return (pos_RC >= 0).sum(-1).view(self.rows, self.heads)

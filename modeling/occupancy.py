"""How full the pages on a cache's lists are, and how many blocks attention may skip: counted from `pos` and the lists.

Letters: R = B*K page lists of a layer, P pages of its pool, p slots of a page, M pages of one list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from einops import rearrange

from modeling.cache import KVCache
from modeling.pages import LayerCache


@dataclass(frozen=True)
class Blocks:
    """What one list, or several together, have of their pool: pages are the blocks of FlexAttention's block lists.

    Attributes:
        pool: pages of the pool, the one that belongs to nobody included; of several lists, the pages that each could read.
        held: pages on the list.
        read: pages with a living entry on it, which are those that hold something for attention.
        written: slots with an entry, living or dead.
        alive: entries that live (for one query head at least). A sliding window may hide some of them.
    """

    pool: int = 0
    held: int = 0
    read: int = 0
    written: int = 0
    alive: int = 0

    @property
    def dead_share(self) -> float:
        """Of the slots written, those whose entry is gone; 0 where nothing is written."""
        return 1 - self.alive / self.written if self.written else 0.0

    @property
    def skipped(self) -> int:
        """Pages of the pool that are not read."""
        return self.pool - self.read

    @property
    def skipped_held(self) -> int:
        """Pages of the list that are not read: all of their entries are gone, or none has been written yet."""
        return self.held - self.read


@dataclass(frozen=True)
class PageList:
    """One list's pages, in its order.

    Attributes:
        pages: [M] their numbers.
        written: [M] slots of each that have an entry, living or dead.
        alive: [M] entries of each that live.
        page: p.
        pool: P.
    """

    pages: tuple[int, ...]
    written: tuple[int, ...]
    alive: tuple[int, ...]
    page: int
    pool: int

    @property
    def blocks(self) -> Blocks:
        """The list's counts."""
        read = sum(count > 0 for count in self.alive)
        return Blocks(self.pool, len(self.pages), read, sum(self.written), sum(self.alive))


def page_lists(layer: LayerCache) -> list[PageList]:
    """The R lists of a layer, read from `pos`, the lists and `used`. Waits for the device: figures for a person."""
    page, pool = layer.pool.page, layer.pool.num_pages
    pos_Pp, slot_p = (
        rearrange(layer.pool.pos, "(P p) -> P p", p=page).cpu(),
        torch.arange(page),
    )  # sync: figures for a person
    lists = []
    for pages, used in zip(layer.lists, layer.lengths(), strict=True):
        written_M = (used - page * torch.arange(len(pages))).clamp(0, page)
        alive_M = ((pos_Pp[pages] >= 0) & (slot_p < written_M[:, None])).sum(-1)
        lists.append(PageList(tuple(pages), tuple(written_M.tolist()), tuple(alive_M.tolist()), page, pool))
    return lists


def cache_lists(cache: KVCache, row: int = 0) -> list[list[PageList]]:
    """The K lists of one row, layer by layer."""
    heads = cache.layers[0].heads
    return [page_lists(layer)[row * heads : (row + 1) * heads] for layer in cache.layers]


def total(blocks: Iterable[Blocks]) -> Blocks:
    """All counts of several lists added up.

    >>> total([Blocks(8, 3, 2, 10, 6), Blocks(8, 1, 1, 4, 4)])
    Blocks(pool=16, held=4, read=3, written=14, alive=10)
    """
    parts = list(blocks)
    return Blocks(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(Blocks)})

"""The pool: slots for entries of the KV cache, in pages, of which lists (pages.py) hold as many as they need.

Letters: G query heads per KV head, D head dim, S slots.

A pool is one pair of tensors k, v [1, 1, S, D] and `pos` [S]: the original position of the token in each slot, -1 if the slot is
empty or its entry was evicted. Page 0 belongs to nobody: finished rows and padding tokens write zeros there, with pos = -1. A
page held by several lists (after a fork) is read-only; whoever wants to write or mark in it copies it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from modeling.room import require

EMPTY = -1  # pos of a slot without a live entry
SINK_PAGE = 0  # the page that swallows writes nobody may read
Companions = Mapping[str, tuple[Sequence[int], torch.dtype]]  # name -> (shape of one slot's value, dtype)


def read(slab: Tensor, slot: Tensor) -> Tensor:
    """slab[slot] of the first dimension, [*slot.shape, ...]: on a CPU several times as fast as indexing with a tensor."""
    return slab.index_select(0, slot.flatten()).view(*slot.shape, *slab.shape[1:])


def pool_size(pages: int, steps: int) -> int:
    """The smallest of the sizes a pool may have that is not below `pages`: `steps` of them between a power of two and the next.

    With 4 steps: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...; with 1: powers of two.
    """
    step = 1 << max(0, (pages - 1).bit_length() - steps.bit_length())
    return -(-pages // step) * step


class PagePool:
    """A slab of `num_pages` pages of `page` slots with a reference-counted free list.

    Args:
        num_pages: usable pages; one more (page 0) is added for discarded writes.
        page: slots per page.
        head_dim, dtype, device: of k and v, which start at zero (a masked NaN would still poison a flex block).
        companions: per-slot data that moves with its entry, zero at first. Known to the forward pass: `keep` [S, G] bool and
            `raw` [S, D] (see LayerView).
        steps: which sizes it may grow to (pool_size).
        max_pages: usable pages that will do for all that is planned: a pool that grows stops there before it goes on.
    Raises:
        MemoryError: so much memory is not free (or whatever torch raises about it).
    """

    def __init__(
        self,
        num_pages: int,
        page: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        companions: Companions | None = None,
        steps: int = 4,
        max_pages: int | None = None,
    ) -> None:
        self.page, self._steps, self._max_pages = page, steps, max_pages
        slots = (num_pages + 1) * page
        sizes = [2 * head_dim * dtype.itemsize, 4]
        sizes += [torch.Size(shape).numel() * kind.itemsize for shape, kind in (companions or {}).values()]
        require(slots * sum(sizes), device)
        self.k = torch.zeros(1, 1, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.full((slots,), EMPTY, dtype=torch.int32, device=device)
        self.companions: dict[str, Tensor] = {
            name: torch.zeros(slots, *shape, dtype=kind, device=device)
            for name, (shape, kind) in (companions or {}).items()
        }
        self._free = list(range(num_pages, SINK_PAGE, -1))
        self._refs = [0] * (num_pages + 1)
        self.shared_pages = 0  # held by several lists

    @property
    def num_pages(self) -> int:
        """Pages in all, page 0 included."""
        return len(self._refs)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values, positions and companions."""
        return self.page * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        per_slot = [self.k[0, 0], self.v[0, 0], self.pos, *self.companions.values()]
        return sum(t[0].numel() * t.element_size() for t in per_slot)

    def _slabs(self) -> list[Tensor]:
        """Every per-slot tensor with the slot as its first dimension."""
        return [self.k[0, 0], self.v[0, 0], self.pos, *self.companions.values()]

    def take(self, count: int) -> list[int]:
        """`count` empty pages (pos = -1 and all else 0 throughout); the pool grows when it has too few."""
        if count > len(self._free):
            usable = self.num_pages - 1
            least = usable + count - len(self._free)
            size = pool_size(least, self._steps)
            if self._max_pages is not None and least <= self._max_pages:
                size = min(size, self._max_pages)
            self.grow(size - usable)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is free and cannot be shared"
            self.shared_pages += self._refs[page] == 1
            self._refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; those nobody else holds are wiped (pos = -1, all else 0) and return to the free list.

        Keys and values too: whoever takes the page next reads its empty slots under a mask, and 0 times NaN is NaN.
        """
        emptied = []
        for page in pages:
            assert self._refs[page] > 0, f"page {page} released twice"
            self._refs[page] -= 1
            self.shared_pages -= self._refs[page] == 1
            if self._refs[page] == 0:
                emptied.append(page)
        if emptied:
            emptied_n = torch.tensor(emptied, device=self.pos.device)
            for slab in self._slabs():
                paged = slab.view(-1, self.page, *slab.shape[1:])
                paged.index_fill_(0, emptied_n, EMPTY if slab is self.pos else 0)
            self._free.extend(reversed(emptied))

    def is_shared(self, page: int) -> bool:
        return self._refs[page] > 1

    def duplicate(self, page: int) -> int:
        """A private copy of a shared page; the caller's hold on the original is given up."""
        (copy,) = self.take(1)
        for slab in self._slabs():
            paged = slab.view(-1, self.page, *slab.shape[1:])
            paged[copy] = paged[page]
        self.release([page])
        return copy

    def grow(self, count: int) -> None:
        """Add `count` pages. Shapes change, so compiled graphs that read this pool are compiled anew.

        Where memory is lacking it stays as it is, and so does every page.
        """
        more, first = count * self.page, self.num_pages
        require((first + count) * self.page_bytes, self.k.device)  # the old slabs go only when the new ones are made
        k = torch.cat([self.k, self.k.new_zeros(1, 1, more, self.k.shape[-1])], dim=2)
        v = torch.cat([self.v, self.v.new_zeros(1, 1, more, self.v.shape[-1])], dim=2)
        pos = torch.cat([self.pos, self.pos.new_full((more,), EMPTY)])
        companions = {
            name: torch.cat([data, data.new_zeros(more, *data.shape[1:])]) for name, data in self.companions.items()
        }
        self.k, self.v, self.pos, self.companions = k, v, pos, companions
        self._refs.extend([0] * count)
        self._free[:0] = range(first + count - 1, first - 1, -1)

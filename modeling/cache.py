"""The cache of a whole model: the page lists of all layers (pages.py), how far its rows are, and the queries it remembers.

Letters: B batch rows, K KV heads, H query heads, D head dim, W remembered queries.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.pages import LayerCache, LayerView, recent
from modeling.pool import Companions, PagePool, pool_size
from modeling.room import require

UNBOUNDED = 2**31 - 1  # reach of a layer without a window, in a model where others have one


class KVCache:
    """The caches of all layers, the next position of every row, and the last W queries of every layer.

    Args:
        layers: one LayerCache per layer.
        ring_size: W, queries to remember per layer (0: none).
        num_heads: H, query heads.
        planned_pages: that the longest list is expected to need; 0: nobody knows.
    Attributes:
        next_pos: [B] int32, position of each row's next token.
        lag: [B] int32, how far the RoPE phase of the next token lies behind its position: 0, or the entries lost so far in a
            cache whose entries are re-rotated to their slots.
        queries: the ring buffers of the last W queries, one per layer.
    """

    def __init__(self, layers: list[LayerCache], ring_size: int, num_heads: int, planned_pages: int = 0) -> None:
        first = layers[0]
        self.planned_pages = planned_pages
        self.layers = layers
        self.rows = first.rows
        self.ring_size = ring_size
        device, dtype, head_dim = first.used.device, first.pool.k.dtype, first.pool.k.shape[-1]
        self.next_pos = torch.zeros(self.rows, dtype=torch.int32, device=device)
        self.lag = torch.zeros_like(self.next_pos)
        slots = self.rows * (ring_size + 1)
        require(len(layers) * slots * num_heads * head_dim * dtype.itemsize if ring_size else 0, device)
        # Ring buffers: the query of position p of row b is at b*(W+1) + p % W; slot W of each row swallows padding.
        self.queries = [
            torch.zeros(slots, num_heads, head_dim, dtype=dtype, device=device) for _ in layers if ring_size
        ]

    @classmethod
    def create(
        cls,
        *,
        windows: Sequence[int | None],
        rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        entries: int,
        page: int,
        ring_size: int = 0,
        companions: Companions | None = None,
        spare: int = 0,
        ragged: bool = False,
        shared: bool = False,
        max_entries: int | None = None,
        filled: int | None = None,
        steps: int = 4,
        longest: int = 0,
    ) -> KVCache:
        """A cache with room for `entries` entries per layer, row and KV head on average, one layer per entry of `windows`.

        `spare` pages per list lie ready besides. `ragged` lists may differ within a layer; with `shared`, all layers draw on
        one pool and may differ too.

        Args:
            max_entries: entries that will do for all that is planned, where that is known. If there is room for them from the
                start, the pools have exactly their size; else one of those that they grow through.
            filled: rows that there is room for; None: all. The others are padding.
            steps: which sizes those are (pool_size).
            longest: entries of the longest list, if the plan says it.
        """
        lists = (rows if filled is None else filled) * num_kv_heads * (len(windows) if shared else 1)
        pages = lists * (-(-entries // page) + spare)
        limit = None if max_entries is None else lists * (-(-max_entries // page) + spare)
        size = pool_size(pages, steps) if limit is None else min(pool_size(pages, steps), limit)
        pools = [
            PagePool(size, page, head_dim, dtype, device, companions, steps, limit)
            for _ in range(1 if shared else len(windows))
        ]
        layers = []
        for index, width in enumerate(windows):
            reach = None
            if any(windows):
                reach = torch.tensor([width or UNBOUNDED], dtype=torch.int32, device=device)
            pool = pools[0 if shared else index]
            layers.append(LayerCache(pool, rows, num_kv_heads, ragged or shared, reach))
        return cls(layers, ring_size, num_heads, -(-longest // page))

    def reserve(self, extra: int | Sequence[int]) -> None:
        """Give every list room for `extra` more entries (one number, or one per row)."""
        if not isinstance(extra, int):
            extra = [count for count in extra for _ in range(self.layers[0].heads)]
        for layer in self.layers:
            layer.reserve(extra)

    def refresh(self) -> None:
        """Take notice of what was done through `row`."""
        for layer in self.layers:
            layer.refresh()

    def views(self) -> list[LayerView]:
        """What a step reads and writes. Pools that have grown apart, by a page of some ragged list, are brought to one size: a
        compiled step would know every combination of sizes for another.
        """
        largest = max(layer.pool.num_pages for layer in self.layers)
        for layer in self.layers:
            if layer.pool.num_pages < largest:
                layer.pool.grow(largest - layer.pool.num_pages)
        return [layer.view() for layer in self.layers]

    def recent(self, layer: int) -> tuple[Tensor, Tensor]:
        """The last W queries of a layer, oldest first: q [B, H, W, D] after RoPE and q_pos [B, W] int64, -1 where none was."""
        return recent(self.queries[layer], self.next_pos, self.ring_size)

    def remember(self, layer: int, row: int, q_HWD: Tensor, last_pos: int) -> None:
        """Store the queries of positions last_pos - n + 1 ... last_pos of one row, W at most."""
        q_HWD = q_HWD[:, -self.ring_size :]
        count = q_HWD.shape[1]
        positions = torch.arange(last_pos - count + 1, last_pos + 1, device=q_HWD.device)
        self.queries[layer][row * (self.ring_size + 1) + positions % self.ring_size] = q_HWD.transpose(0, 1)

    def fork(self, rows: Sequence[int] | None = None) -> KVCache:
        """A cache whose row i continues row rows[i] (all rows by default); pages are shared until written."""
        rows = list(range(self.rows)) if rows is None else list(rows)
        twin = copy.copy(self)
        twin.rows = len(rows)
        twin.layers = [layer.fork(rows) for layer in self.layers]
        twin.next_pos, twin.lag = self.next_pos[rows], self.lag[rows]
        slots = [row * (self.ring_size + 1) + i for row in rows for i in range(self.ring_size + 1)]
        twin.queries = [ring[slots] for ring in self.queries]
        return twin

    def row(self, index: int) -> KVCache:
        """A window onto one row: what is done to it is done to this cache, which sees it after `refresh`."""
        part = copy.copy(self)
        part.rows = 1
        part.layers = [layer.row(index) for layer in self.layers]
        part.next_pos, part.lag = self.next_pos[index : index + 1], self.lag[index : index + 1]
        slots = slice(index * (self.ring_size + 1), (index + 1) * (self.ring_size + 1))
        part.queries = [ring[slots] for ring in self.queries]
        return part

    def free(self) -> None:
        """Give every page back."""
        for layer in self.layers:
            layer.clear()

    @property
    def live_bytes(self) -> int:
        """Bytes of live keys and values (and their positions and companions)."""
        return sum(int(layer.live_counts().sum()) * layer.pool.slot_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pages on the lists."""
        return sum(layer.allocated_bytes for layer in self.layers)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the pools' tensors, free pages included."""
        pools = {id(layer.pool): layer.pool for layer in self.layers}
        return sum(pool.num_pages * pool.page_bytes for pool in pools.values())

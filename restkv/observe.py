"""What a policy sees: the last queries of one layer, its entries, and the attention between them.

Letters: B batch rows, H query heads, K KV heads, G = H/K, C entries of one head (columns), D head dim, W observed
queries, E hidden width, X = K or H, S kinds of sizes. Query head h reads KV head h // G.

Attention over long contexts is computed in chunks (whole rows of some heads and queries, or some columns of all of them), so
that nothing of size [H, W, C] or [H, C, D] has to exist beyond one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from modeling.ranks import ALONE, Ranks
from restkv.select import largest

# Elements of the largest temporary. A CPU is fastest when it stays in the cache (8 MiB in float32), a GPU with fewer launches.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 1 << 21, 1 << 25


Made = TypeVar("Made")


def chunk_elements(device: torch.device) -> int:
    """How many elements a temporary may have."""
    if torch.compiler.is_compiling():  # every piece would be code of its own, and loops of a graph store little
        return CHUNK_ELEMENTS_GPU
    return CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU


@dataclass(frozen=True, eq=False)
class Observation:
    """One layer at the moment of eviction.

    Only q, q_pos, k, v, pos, root and softmax_scale are needed to build one by hand. Half-precision tensors are computed with
    in float32, float64 ones in float64. What lies in rows with q_pos = -1 or in columns with pos = -1 has no influence
    as long as it is finite. Columns may be in any order.
    """

    q: Tensor  # [B, H, W, D] the last W queries after RoPE, oldest first
    q_pos: Tensor  # [B, W] int, their positions; -1 = no such query (a row shorter than W): those come first
    k: Tensor  # [B, K, C, D] the layer's entries after RoPE: a whole prompt, or what earlier evictions left
    v: Tensor  # [B, K, C, D]
    pos: Tensor  # [B, K, C] int, original position of each entry; -1 = padding
    root: Tensor | None  # [H, D, F] of W_O (root_of); [K, G, D, F] for a policy that needs "group_root" (Policy.needs)
    softmax_scale: float  # what q.k is multiplied with
    softcap: float | None = None  # attention logits x become softcap * tanh(x / softcap)
    sliding_window: int | Tensor | None = None  # sliding-window layer: a query at p sees positions in (p - window, p]
    layer: int | Tensor = 0
    num_layers: int = 1
    keep: Tensor | None = None  # [B, H, C] bool, granularity "query": the entries each query head still has; None = all
    mass: Tensor | None = None  # [B, X, C] float32, attention an entry has collected so far (H2O)
    bias: Tensor | None = None  # [B, K, C] float32, added to the logits of an entry that was refitted (restkv/refit.py)
    protected: Tensor | None = None  # [B, K, C] bool, entries that will be kept whatever their score
    budget_B: Tensor | int | None = None  # entries per head to be kept, [B] or the same for all rows
    budgets: tuple[int, ...] | None = (
        None  # budget_B as the host knows it: a score that ranks entries need rank no more of them
    )
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = (
        None  # positions [B, T] -> cos, sin [B, T, D] float32 (RoPE)
    )
    # [B, S, W] float32, lengths of the hidden states that the queries come from: of the residual stream before the layer, and for
    # a policy that needs "normed" of what the layer projects, the stream after its norm. None where nobody knows them any more.
    sizes: Tensor | None = None
    end: int | None = (
        None  # entries before this position are compared; None: those older than the oldest observed query
    )
    gap: int = 0  # a query counts for entries more than so many positions before it, though it attends to all
    run: Callable[..., Tensor] | None = None  # compiles functions over PIECE columns of a prompt (restkv/pieces.py)
    # What scores of the same queries over the same entries share, when several policies are asked at once; None: nothing.
    memo: dict[Any, Any] | None = None
    looks: tuple[Look, ...] = ()  # whose queries score the entries in place of q's: a probe's (restkv/probes.py)
    # Ranks that have the layer's other heads: H and K are this one's, rank * K heads come before them. None: there are no others
    # (a graph that builds an observation can have None as a default, and no object).
    among: Ranks | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: float64 for float64 queries, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def ranks(self) -> Ranks:
        """Those that have the layer's heads."""
        return ALONE if self.among is None else self.among

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def stream(self) -> Tensor | None:
        """[B, W] length of the residual stream before the layer where each query comes from; None: unknown."""
        return None if self.sizes is None else self.sizes[:, 0]

    @property
    def normed(self) -> Tensor | None:
        """[B, W] the same of the stream after the layer's norm; None: unknown, or not asked for."""
        return None if self.sizes is None or self.sizes.shape[1] < 2 else self.sizes[:, 1]

    @property
    def held(self) -> Tensor:
        """[B, H, C] int: position of each entry a query head holds, -1 for padding and for entries it has evicted."""
        pos_BHC = self.pos.repeat_interleave(self.group, 1)
        return pos_BHC if self.keep is None else pos_BHC.masked_fill(~self.keep, -1)

    @property
    def past(self) -> Tensor:
        """[B, H, C] bool: entries older than the oldest observed query (or `end`), which are the ones a policy chooses among."""
        if self.end is not None:
            return (self.held >= 0) & (self.held < self.end)
        seen_BW = self.q_pos >= 0
        oldest_B = self.q_pos.masked_fill(~seen_BW, torch.iinfo(self.q_pos.dtype).max).amin(-1)
        oldest_B = oldest_B.masked_fill(~seen_BW.any(-1), 0)
        held_BHC = self.held
        return (held_BHC >= 0) & (held_BHC < oldest_B[:, None, None])

    @property
    def order(self) -> Tensor:
        """[B, H, C] long: the columns of each query head's entries, oldest first; those it does not hold come last."""
        if self.keep is None:
            return _oldest_first(self.pos).repeat_interleave(self.group, 1)
        return _oldest_first(self.held)

    @property
    def hidden(self) -> Tensor:
        """[B, K, C] bool: entries of a sliding-window layer that no query after the newest one can see."""
        if self.sliding_window is None:
            return torch.zeros_like(self.pos, dtype=torch.bool)
        return self.pos <= self.q_pos[:, -1, None, None] + 1 - self.sliding_window

    def chunks(self, per_column: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the columns and their indices, so long that `per_column` elements for each column stay affordable."""
        columns = self.k.shape[2]
        step = max(1, chunk_elements(self.k.device) // per_column)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            yield slice(start, stop), torch.arange(start, stop, device=self.k.device)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, or what it returned for the same key to somebody who shares this memo."""
        if self.memo is None:
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def rows(self, seen: bool = False) -> Iterator[Rows]:
        """All logits, piece by piece, in whole rows: as many KV heads at once as are affordable, or of one head some queries.

        Args:
            seen: leave out the last columns, as far as none of a piece's queries sees them. Smaller pieces then: whoever looks at
                thousands of queries goes over each many times.
        """
        if self.memo is None:
            return self._rows(seen)
        # The tensors are kept with their rows, so that nothing else gets their ids.
        key = "rows", id(self.q), id(self.k), self.gap, seen
        *_, pieces = self.once(key, lambda: (self.q, self.k, [KeptRows(*one) for one in self._rows(seen)]))
        return iter(pieces)

    def _rows(self, seen: bool) -> Iterator[Rows]:
        B, _, W, _ = self.q.shape
        K, C = self.k.shape[1:3]
        elements = chunk_elements(self.k.device)
        if seen and self.k.device.type == "cpu":
            elements = max(1, elements // 4)
        affordable = elements // (B * self.group * C)  # KV heads times queries
        heads, queries = max(1, min(K, affordable // W)), max(1, min(W, affordable))
        for head in range(0, K, heads):
            for query in range(0, W, queries):
                head_slice, query_slice = slice(head, min(head + heads, K)), slice(query, min(query + queries, W))
                grouped = slice(head_slice.start * self.group, head_slice.stop * self.group)
                reach = self._reach(query_slice)
                columns = slice(0, reach.stop if seen else C)
                near_from = min(reach.near, columns.stop)
                yield Rows(
                    grouped,
                    query_slice,
                    self.logits(columns, query_slice, head_slice),
                    reach.all > 0,
                    self.near(slice(near_from, columns.stop), query_slice, head_slice),
                    near_from,
                )

    def near(
        self, columns: slice | None = None, queries: slice | None = None, heads: slice | None = None
    ) -> Tensor | None:
        """Bool [B, H, W, C] of some columns, queries and KV heads (with their groups): entries within `gap` positions before a
        query, for which it does not count; None where there is no gap.
        """
        if not self.gap:
            return None
        columns, queries, heads = columns or slice(None), queries or slice(None), heads or slice(None)
        pos_BK1C, q_pos_B1W1 = self.pos[:, heads, None, columns], self.q_pos[:, None, queries, None]
        return (pos_BK1C >= q_pos_B1W1 - self.gap).repeat_interleave(self.group, 1)

    def logits(self, columns: slice | None = None, queries: slice | None = None, heads: slice | None = None) -> Tensor:
        """Attention logits [B, H, W, C] of some columns, queries and KV heads (with their groups); -inf for what a query may
        not see: the future, what has left a sliding window, padding, and entries its head does not hold.
        """
        G = self.group
        # Not as default arguments: dynamo of torch 2.11 knows no slice there.
        columns, queries, heads = columns or slice(None), queries or slice(None), heads or slice(None)
        q_BKGWD = self.q.unflatten(1, (-1, G))[:, heads, :, queries].to(self.dtype) * self.softmax_scale
        B, K, _, W, D = q_BKGWD.shape
        q_BKQD = q_BKGWD.reshape(B, K, G * W, D)
        logits_BKGWC = (q_BKQD @ self.k[:, heads, columns].to(self.dtype).mT).view(B, K, G, W, -1)
        if self.softcap is not None:
            logits_BKGWC = self.softcap * torch.tanh(logits_BKGWC / self.softcap)
        if self.bias is not None:
            logits_BKGWC = logits_BKGWC + self.bias[:, heads, None, None, columns]
        start = min(max(0, self._reach(queries).all - (columns.start or 0)), logits_BKGWC.shape[-1])
        later_BKGWC, columns = logits_BKGWC[..., start:], slice((columns.start or 0) + start, columns.stop)
        pos_BK11C = self.pos[:, heads, None, None, columns]
        q_pos_B11W1 = self.q_pos[:, None, None, queries, None]
        visible = (pos_BK11C >= 0) & (pos_BK11C <= q_pos_B11W1)
        if self.sliding_window is not None:
            visible = visible & (pos_BK11C > q_pos_B11W1 - self.sliding_window)
        if self.keep is not None:
            visible = visible & self.keep.unflatten(1, (-1, G))[:, heads, :, None, columns]
        later_BKGWC.masked_fill_(~visible, -torch.inf)
        return logits_BKGWC.flatten(1, 2)

    def _reach(self, queries: slice) -> Reach:
        """Of some queries, as far as a CPU can tell; asking another device would be waiting for it."""
        C = self.pos.shape[-1]
        if self.pos.device.type != "cpu" or torch.compiler.is_compiling():
            return Reach(0, 0, C)
        q_pos_BW = self.q_pos[:, queries]
        first_B11, last_B11 = q_pos_BW.amin(-1)[:, None, None], q_pos_BW.amax(-1)[:, None, None]
        later = first_column(self.pos > last_B11, every=True)
        near = first_column(self.pos >= first_B11 - self.gap, every=False) if self.gap else C
        if self.sliding_window is not None or self.keep is not None:
            return Reach(0, near, later)
        return Reach(first_column((self.pos < 0) | (self.pos > first_B11), every=False), near, later)

    def attention(self, lse_BHW: Tensor, columns: slice | None = None) -> Tensor:
        """Softmax weights [B, H, W, C] of some columns; they sum to 1 over all columns, less those of `near`, which are 0."""
        a_BHWC = torch.exp(self.logits(columns) - lse_BHW[..., None])
        near_BHWC = self.near(columns)
        return a_BHWC if near_BHWC is None else a_BHWC.masked_fill(near_BHWC, 0)


class Look(NamedTuple):
    """What some queries see of a layer: the entries to be scored, or some of them, and after them entries of their own.

    of: makes, of the layer's observation, one as if these were all the entries (a copy of the keys and values: not before it is
    needed, and only for so long); at: [n] long, which of the scored entries its first n columns are, None: all of them.
    """

    of: Callable[[Observation], Observation]
    at: Tensor | None = None


class Reach(NamedTuple):
    """Columns of some queries.

    Attributes:
        all: none of those before it is hidden from any of them.
        near: none of those before it is near any of them (Observation.near).
        stop: none of them sees it or any later one; at least 1.
    """

    all: int
    near: int
    stop: int


class Rows(NamedTuple):
    """Attention logits of some query heads and some queries over all columns, or the first ones."""

    heads: slice
    queries: slice
    logits_BHWC: Tensor
    all_see: bool = False  # every query sees something; the softmax of one that sees nothing is NaN
    near_BHWN: Tensor | None = None  # see Observation.near: of the columns from near_from on
    near_from: int = 0

    def normalizer_BHW(self) -> Tensor:
        """Log-sum-exp of every row; 0 for a query that sees nothing, so that its weights are 0."""
        lse_BHW = self.logits_BHWC.logsumexp(-1)
        return lse_BHW.masked_fill(lse_BHW == -torch.inf, 0)

    def weights_BHWC(self) -> Tensor:
        """These queries' softmax weights, 0 throughout for one that sees nothing."""
        if torch.compiler.is_compiling():  # without a NaN, which compiled loops look for one by one
            highest_BHW1 = self.logits_BHWC.amax(-1, keepdim=True).clamp_min(_lowest(self.logits_BHWC))
            a_BHWC = (self.logits_BHWC - highest_BHW1).exp()
            # The largest is 1, unless the query sees nothing.
            a_BHWC = a_BHWC / a_BHWC.sum(-1, keepdim=True).clamp_min(1)
        else:
            a_BHWC = self.logits_BHWC.softmax(-1)
            if not self.all_see:
                a_BHWC.nan_to_num_(0)
        return a_BHWC

    def largest_BHWT(self, count: int) -> Tensor:
        """Columns of the `count` largest logits of every query, in any order."""
        return largest(self.logits_BHWC, count)

    def own_weights_BHWC(self) -> Tensor:
        """The same, which the caller may write to."""
        return self.weights_BHWC()

    def attention_BHWC(self) -> Tensor:
        """The same, 0 where a query does not count (Observation.gap); not to be written to."""
        return self.weights_BHWC() if self.near_BHWN is None else self.counting(self.own_weights_BHWC())

    def counting(self, x_BHWC: Tensor) -> Tensor:
        """What is of some of the first columns, with 0 in place of what does not count."""
        if self.near_BHWN is not None and x_BHWC.shape[-1] > self.near_from:
            tail_BHWn = x_BHWC[..., self.near_from :]
            tail_BHWn.masked_fill_(self.near_BHWN[..., : tail_BHWn.shape[-1]], 0)
        return x_BHWC

    def add_attention(self, total_BHC: Tensor, weight_BW: Tensor) -> None:
        """Add these queries' softmax weights, each times its own weight, to [B, H, C]."""
        total_BHC[:, self.heads] += (weight_BW[:, None, None, self.queries] @ self.attention_BHWC())[:, :, 0]


class KeptRows(Rows):
    """Rows whose softmax weights are made once, and whose largest logits are looked for among those found before."""

    def largest_BHWT(self, count: int) -> Tensor:
        """See Rows."""
        found: dict[int, Tensor] = self.__dict__.setdefault("_found", {})
        if count not in found:
            among_BHWT = min(
                (some for some in found.values() if some.shape[-1] > count), key=lambda x: x.shape[-1], default=None
            )
            if among_BHWT is None:
                found[count] = super().largest_BHWT(count)
            else:
                found[count] = among_BHWT.gather(-1, largest(self.logits_BHWC.gather(-1, among_BHWT), count))
        return found[count]

    def weights_BHWC(self) -> Tensor:
        """See Rows; not to be written to."""
        if not hasattr(self, "_weights_BHWC"):
            self._weights_BHWC = super().weights_BHWC()
        return self._weights_BHWC

    def own_weights_BHWC(self) -> Tensor:
        """A copy of them."""
        return self.weights_BHWC().clone()


def attention_BHWC(obs: Observation) -> Tensor:
    """The observed queries' softmax weights over all columns at once, [B, H, W, C] in obs.dtype."""
    return obs.logits().softmax(-1).nan_to_num(0)


def weighted_attention(obs: Observation, weight_BW: Tensor) -> Tensor:
    """Sum over the observed queries of weight * softmax weights, [B, H, C] in obs.dtype."""
    total_BHC = nothing(obs)
    for rows in obs.rows():
        rows.add_attention(total_BHC, weight_BW)
    return total_BHC


def strongest_attention(obs: Observation, weight_BW: Tensor | None = None) -> Tensor:
    """The most of a softmax weight that any observed query gives, times the query's own weight, [B, H, C] in obs.dtype."""
    most_BHC = nothing(obs)
    for rows in obs.rows(seen=True):
        a_BHWC = rows.attention_BHWC()
        if weight_BW is not None:
            # A product of its own: rows may be shared (memo), and nothing of theirs is written to.
            a_BHWC = a_BHWC * weight_BW[:, None, rows.queries, None]
        seen = slice(0, a_BHWC.shape[-1])
        most_BHC[:, rows.heads, seen] = torch.maximum(most_BHC[:, rows.heads, seen], a_BHWC.amax(2))
        del a_BHWC  # not alive beside the next piece
    return most_BHC


def nothing(obs: Observation) -> Tensor:
    """Zeros [B, H, C] in obs.dtype."""
    return torch.zeros(*obs.q.shape[:2], obs.k.shape[2], dtype=obs.dtype, device=obs.k.device)


def root_of(w_o_EHD: Tensor) -> Tensor:
    """[H, D, F], F = min(D, E), in float32 (float64 for float64 weights): ||u root[h]|| = ||W_O^h u||.

    It is R^T of W_O^h = Q R, and stands in for the projection at F/E of the work and without an [H, C, E] tensor
    (docs/sources.md §1.6 g).
    Unlike the Gram matrix W_O^h^T W_O^h it squares nothing.
    """
    return _triangle(_full_precision(w_o_EHD).transpose(0, 1))


def group_root_of(w_o_EHD: Tensor, num_kv_heads: int) -> Tensor:
    """[K, G, D, F], F = min(G D, E): ||sum_g u_g root[k, g]|| = ||sum_g W_O^g u_g|| over KV head k's group; dtype as root_of."""
    E, H, D = w_o_EHD.shape
    w_KEQ = _full_precision(w_o_EHD).reshape(E, num_kv_heads, H // num_kv_heads * D).transpose(0, 1)
    return _triangle(w_KEQ).unflatten(1, (-1, D))


def _triangle(w: Tensor) -> Tensor:
    return torch.linalg.qr(w, mode="r").R.mT.contiguous()


def _oldest_first(pos_BXC: Tensor) -> Tensor:
    return pos_BXC.masked_fill(pos_BXC < 0, torch.iinfo(pos_BXC.dtype).max).argsort(dim=-1, stable=True)


def first_column(holds_BKC: Tensor, every: bool) -> int:
    """With `every` the column from which on it holds for all, at least 1; else the first for which it holds for any; or C."""
    if not every:
        holds_C = holds_BKC.flatten(0, 1).any(0).numpy()  # no sync: a CPU
        return int(holds_C.argmax()) if holds_C.any() else len(holds_C)
    rests_C = ~holds_BKC.flatten(0, 1).all(0).numpy()  # nor is this
    return max(1, len(rests_C) - int(rests_C[::-1].argmax())) if rests_C.any() else min(1, len(rests_C))


def _lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

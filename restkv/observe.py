"""What a policy sees: the last queries of one layer, its entries, and the attention between them.

Letters: B batch rows, H query heads, K KV heads, G = H/K, C entries of one head (columns), D head dim, W observed
queries, E hidden width, X = K or H. Query head h reads KV head h // G.

Attention over long contexts is computed in chunks of columns (a pass for the log-sum-exp, a pass for whatever is made
of the weights), so that nothing of size [H, W, C] or [H, C, D] has to exist beyond one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of the largest temporary. A CPU is fastest when it stays in the cache (8 MiB in float32), a GPU with fewer launches.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 1 << 21, 1 << 25


def chunk_elements(device: torch.device) -> int:
    """How many elements a temporary may have."""
    return CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU


@dataclass(frozen=True, eq=False)
class Observation:
    """One layer at the moment of eviction.

    Only q, q_pos, k, v, pos, gram and scale are needed to build one by hand. Half-precision tensors are computed with
    in float32, float64 ones in float64. What lies in rows with q_pos = -1 or in columns with pos = -1 has no influence
    as long as it is finite. Columns may be in any order.
    """

    q: Tensor  # [B, H, W, D] the last W queries after RoPE, oldest first
    q_pos: Tensor  # [B, W] int, their positions; -1 = no such query (a row shorter than W): those come first
    k: Tensor  # [B, K, C, D] the layer's entries after RoPE: a whole prompt, or what earlier evictions left
    v: Tensor  # [B, K, C, D]
    pos: Tensor  # [B, K, C] int, original position of each entry; -1 = padding
    gram: Tensor | None  # [H, D, D] W_O^h^T W_O^h; [K, G, D, G, D] for a policy that needs "cross_gram" (Policy.needs)
    scale: float  # what q.k is multiplied with
    softcap: float | None = None  # attention logits x become softcap * tanh(x / softcap)
    window: int | None = None  # sliding-window layer: a query at p sees positions in (p - window, p]
    layer: int = 0
    num_layers: int = 1
    keep: Tensor | None = None  # [B, H, C] bool, granularity "query": the entries each query head still has; None = all
    mass: Tensor | None = None  # [B, X, C] float32, attention an entry has collected so far (H2O)
    protected: Tensor | None = None  # [B, K, C] bool, entries that will be kept whatever their score
    budget_B: Tensor | int | None = None  # entries per head to be kept, [B] or the same for all rows
    budget_most: int | None = None  # at least every one of budget_B: what the host knows, so that ranking stops there
    shared: dict[Hashable, Tensor] | None = (
        None  # scores of these entries under other policies, for those that score alike
    )
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = (
        None  # positions [B, T] -> cos, sin [B, T, D] float32 (RoPE)
    )

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: float64 for float64 queries, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def held(self) -> Tensor:
        """[B, H, C] int: position of each entry a query head holds, -1 for padding and for entries it has evicted."""
        pos_BHC = self.pos.repeat_interleave(self.group, 1)
        return pos_BHC if self.keep is None else pos_BHC.masked_fill(~self.keep, -1)

    @property
    def past(self) -> Tensor:
        """[B, H, C] bool: entries older than the oldest observed query, which are the ones a policy chooses among."""
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
        if self.window is None:
            return torch.zeros_like(self.pos, dtype=torch.bool)
        return self.pos <= self.q_pos[:, -1, None, None] + 1 - self.window

    def chunks(self, per_column: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the columns and their indices, so long that `per_column` elements for each column stay affordable."""
        columns = self.k.shape[2]
        step = max(1, chunk_elements(self.k.device) // per_column)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            yield slice(start, stop), torch.arange(start, stop, device=self.k.device)

    def attention_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices for which [B, H, W, C] is affordable."""
        B, H, W, _ = self.q.shape
        return self.chunks(B * H * W)

    def query_chunks(self) -> Iterator[slice]:
        """Slices of the queries for which [B, H, W, C] is affordable (one query at least)."""
        B, H, W, _ = self.q.shape
        step = max(1, chunk_elements(self.k.device) // (B * H * self.k.shape[2]))
        for start in range(0, W, step):
            yield slice(start, start + step)

    def logits(self, columns: slice = slice(None), queries: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """Attention logits [B, H, W, C] of some columns, queries and KV heads (with their groups); -inf for what a query may
        not see: the future, what has left a sliding window, padding, and entries its head does not hold.
        """
        G = self.group
        q_BKGWD = self.q.unflatten(1, (-1, G))[:, heads, :, queries].to(self.dtype)
        B, K, _, W, D = q_BKGWD.shape
        q_BKQD = q_BKGWD.reshape(B, K, G * W, D)
        logits_BKGWC = (q_BKQD @ self.k[:, heads, columns].to(self.dtype).mT).view(B, K, G, W, -1) * self.scale
        if self.softcap is not None:
            logits_BKGWC = self.softcap * torch.tanh(logits_BKGWC / self.softcap)
        pos_BK11C = self.pos[:, heads, None, None, columns]
        q_pos_B11W1 = self.q_pos[:, None, None, queries, None]
        visible = (pos_BK11C >= 0) & (pos_BK11C <= q_pos_B11W1)
        if self.window is not None:
            visible = visible & (pos_BK11C > q_pos_B11W1 - self.window)
        if self.keep is not None:
            visible = visible & self.keep.unflatten(1, (-1, G))[:, heads, :, None, columns]
        return logits_BKGWC.masked_fill(~visible, -torch.inf).flatten(1, 2)

    def normalizer_and_top(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of each query's logits and the column of the largest, [B, H, W] each.

        A query that sees nothing has a log-sum-exp of 0, so that its weights are 0.
        """
        lse_BHW = self.q.new_full(self.q.shape[:3], -torch.inf, dtype=self.dtype)
        most_BHW, top_BHW = lse_BHW, torch.zeros_like(lse_BHW, dtype=torch.long)
        for columns, _ in self.attention_chunks():
            logits_BHWC = self.logits(columns)
            lse_BHW = torch.logaddexp(lse_BHW, logits_BHWC.logsumexp(-1))
            here_BHW, at_BHW = logits_BHWC.max(-1)
            top_BHW = torch.where(here_BHW > most_BHW, at_BHW + columns.start, top_BHW)
            most_BHW = torch.maximum(here_BHW, most_BHW)
        return lse_BHW.masked_fill(lse_BHW == -torch.inf, 0), top_BHW

    def attention(self, lse_BHW: Tensor, columns: slice = slice(None)) -> Tensor:
        """Softmax weights [B, H, W, C] of some columns; they sum to 1 over all columns."""
        return torch.exp(self.logits(columns) - lse_BHW[..., None])


def attention_BHWC(obs: Observation) -> Tensor:
    """The observed queries' softmax weights over all columns at once, [B, H, W, C] in obs.dtype."""
    return obs.attention(obs.normalizer_and_top()[0])


def weighted_attention(obs: Observation, weight_BW: Tensor) -> Tensor:
    """Sum over the observed queries of weight * softmax weights, [B, H, C] in obs.dtype."""
    B, _, W, _ = obs.q.shape
    K, C = obs.k.shape[1:3]
    heads = chunk_elements(obs.q.device) // (B * obs.group * W * C)
    if heads:  # KV heads whose weights over all columns may exist at once: their logits are made only once
        parts = []
        for first in range(0, K, heads):
            a_BHWC = obs.logits(heads=slice(first, first + heads)).softmax(-1)
            parts.append(torch.einsum("bhwc,bw->bhc", a_BHWC.nan_to_num(0), weight_BW))
        return torch.cat(parts, 1)
    lse_BHW, _ = obs.normalizer_and_top()
    parts = [torch.einsum("bhwc,bw->bhc", obs.attention(lse_BHW, c), weight_BW) for c, _ in obs.attention_chunks()]
    return torch.cat(parts, -1)


def gram_of(w_o_EHD: Tensor) -> Tensor:
    """[H, D, D] in float32 (float64 for float64 weights): W_O^h^T W_O^h, so that ||W_O^h u||^2 = u^T gram[h] u.

    It stands in for the projection at 1/(E/D) of the work and without an [H, C, E] tensor (SPEC §1.6 g).
    """
    w_HED = _full_precision(w_o_EHD).transpose(0, 1)
    return w_HED.mT @ w_HED


def cross_gram_of(w_o_EHD: Tensor, num_kv_heads: int) -> Tensor:
    """[K, G, D, G, D]: W_O^g^T W_O^g' of the query heads g, g' that share a KV head; dtype as gram_of."""
    E, H, D = w_o_EHD.shape
    G = H // num_kv_heads
    w_KEQ = _full_precision(w_o_EHD).reshape(E, num_kv_heads, G * D).transpose(0, 1)
    return (w_KEQ.mT @ w_KEQ).view(num_kv_heads, G, D, G, D)


def _oldest_first(pos_BXC: Tensor) -> Tensor:
    return pos_BXC.masked_fill(pos_BXC < 0, torch.iinfo(pos_BXC.dtype).max).argsort(dim=-1, stable=True)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

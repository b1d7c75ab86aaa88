"""Compactor (Chari & Van Durme, 2025, arXiv 2507.08143): outliers among the keys, and what a text's own parts look at.

Letters: B batch rows, H query heads, K KV heads, G = H / K, C entries of one head (columns), D head dim, W observed
queries, S numbers of a sketched key; P places of a head's entries in order of position, n chunks of s places, r of a
chunk's queries.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from modeling.ranks import ALONE, Ranks
from modeling.rope import unrotate
from restkv.errors import PolicyError
from restkv.observe import Observation, chunk_elements
from restkv.policies.base import TOO_MANY, Policy, is_number
from restkv.policies.hashes import gaussian

WIDEST_SKETCH, LONGEST_CHUNK = 1 << 10, 1 << 12
JITTER = 1e-2  # added to the Gram matrix, as in the authors' code
LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Compactor(Policy):
    """Score = blending * z(leverage) + z(attention), z-scores being over all heads and entries of a layer.

    With X the head's keys before RoPE, less their mean, times a Gaussian matrix [D, 48] / sqrt(48), and places in
    chunks of 256,

        leverage_n  = x_n (X^T X + 0.01)^-1 x_n
        attention_n = mean of three neighbours of ||v|| * sum over the queries q of n's chunk of softmax_chunk(q k)_n

    The softmax is over the chunk, later entries included, and its logits are not scaled (nor capped), as in the
    authors' code; the mean over the group is taken before the product. What is protected (first `sinks`, last
    `window`) is left out of all of it. `blending` is by default the share of the entries that has to go (kvpress).
    While decoding, the queries are those since the last eviction: a chunk without one says nothing of its entries, and
    leverage decides. The Gaussian numbers are hashes of `seed`, layer and head.
    """

    name: ClassVar[str] = "compactor"
    exchanges: ClassVar[str | None] = "sums"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)

    window: int = 4
    sinks: int = 8
    interval: int | None = None
    blending: float | None = None  # weight of leverage; None: the share of the layer's entries that has to go
    sketch_dimension: int = 48
    chunk_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.blending is None or (is_number(self.blending) and 0 <= self.blending < TOO_MANY)
        self._require(valid, "blending", "give a number of at least 0, or None for the share that has to go")
        for option, most in (("sketch_dimension", WIDEST_SKETCH), ("chunk_size", LONGEST_CHUNK)):
            value = getattr(self, option)
            valid = isinstance(value, int) and is_number(value) and 1 <= value <= most
            self._require(valid, option, f"give a whole number of at least 1, at most {most}")
        valid = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        self._require(valid and 0 <= self.seed < 1 << 32, "seed", "give a whole number from 0 to 2^32 - 1")

    @property
    def needs(self) -> frozenset[str]:
        """RoPE at any position: keys are turned back to where they came from."""
        return frozenset({"rotary"})

    @property
    def observed(self) -> int:
        """The queries since the last eviction, but for the newest `window`, which do not count."""
        return self.window + (self.interval or 1)

    @property
    def observed_prompt(self) -> int:
        """All of them."""
        return sys.maxsize

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C]."""
        last_B11 = (obs.q_pos[:, -1] - self.window)[:, None, None]
        counted_BKC = (obs.pos >= max(self.sinks, 0)) & (obs.pos <= last_B11)
        leverage_BKC = standardized(self._leverage(obs, counted_BKC), counted_BKC, obs.ranks)
        attention_BKC = standardized(*self._attention(obs, counted_BKC), obs.ranks)
        return self._blending(obs) * leverage_BKC + attention_BKC

    def _blending(self, obs: Observation) -> Tensor:
        """[B, 1, 1] or a number."""
        if self.blending is not None:
            return torch.full((), self.blending, dtype=obs.dtype, device=obs.pos.device)
        budget_B = obs.budget_B if obs.budget_B is not None else self.budget
        if not isinstance(budget_B, int | Tensor):
            raise PolicyError(f"compactor: budget {budget_B!r}: blending=None needs a number of entries (obs.budget_B)")
        entries_B = obs.ranks.sum((obs.pos >= 0).sum((1, 2))).to(obs.dtype)
        stays_B = budget_B * (obs.pos.shape[1] * obs.ranks.size) / entries_B.clamp_min(1)
        return (1 - stays_B).clamp(0, 1)[:, None, None]

    def _leverage(self, obs: Observation, counted_BKC: Tensor) -> Tensor:
        """[B, K, C]: from three readings of the keys, none of which holds more than a part of them."""
        B, K, _, D = obs.k.shape
        shape, before = (K, D, self.sketch_dimension), obs.ranks.rank * K
        sketch_KDS = gaussian(self.seed, obs.layer, shape, obs.k.device, before)
        sketch_KDS = sketch_KDS / math.sqrt(self.sketch_dimension)
        chunks = [columns for columns, _ in obs.chunks(B * K * max(D, self.sketch_dimension))]
        count_BK11 = counted_BKC.sum(-1)[..., None, None].clamp_min(1)
        mean_BK1D = torch.zeros(B, K, 1, D, dtype=obs.dtype, device=obs.k.device)
        for c in chunks:
            mean_BK1D = mean_BK1D + (_plain(obs, c) * counted_BKC[..., c, None]).sum(2, keepdim=True)
        mean_BK1D = mean_BK1D / count_BK11
        # In float64: a Gram matrix of fewer keys than 48 is singular but for its jitter, which float32 could lose.
        gram_BKSS = torch.zeros(B, K, *[self.sketch_dimension] * 2, dtype=torch.float64, device=obs.k.device)
        for c in chunks:
            off_BKCD = (_plain(obs, c) - mean_BK1D) * counted_BKC[..., c, None]
            x_BKCS = (off_BKCD @ sketch_KDS.to(obs.dtype)).double()
            gram_BKSS = gram_BKSS + x_BKCS.mT @ x_BKCS
        jitter_BK1 = gram_BKSS.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).mul(1e-12).clamp_min(JITTER)
        eye_SS = torch.eye(self.sketch_dimension, dtype=torch.float64, device=obs.k.device)
        root_BKSS = torch.linalg.cholesky_ex(gram_BKSS + jitter_BK1[..., None] * eye_SS).L
        # x (R R^T)^-1 x^T is the square of x R^-T: never below 0.
        basis_BKDS = sketch_KDS @ torch.linalg.solve_triangular(root_BKSS, eye_SS, upper=False).mT
        basis_BKDS = basis_BKDS.to(obs.dtype)
        return torch.cat([((_plain(obs, c) - mean_BK1D) @ basis_BKDS).square().sum(-1) for c in chunks], -1)

    def _attention(self, obs: Observation, counted_BKC: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk attention times ||v||, over three neighbours, and for which entries it is known: [B, K, C] each."""
        C, W = counted_BKC.shape[-1], obs.q.shape[2]
        s = min(self.chunk_size, C)
        n = -(-C // s)
        order_BKC = obs.pos.masked_fill(~counted_BKC, torch.iinfo(obs.pos.dtype).max).argsort(dim=-1, stable=True)
        order_BKP = F.pad(order_BKC, (0, n * s - C))
        live_BKP = torch.arange(n * s, device=order_BKP.device) < counted_BKC.sum(-1, keepdim=True)
        # A query counts where its own entry does. Those observed are the row's last, one after another.
        pos_BKP = obs.pos.gather(-1, order_BKP)
        row_BKP = (pos_BKP - obs.q_pos[:, -1, None, None] + W - 1).clamp(0, W - 1)
        q_pos_BKP = obs.q_pos.gather(1, row_BKP.flatten(1)).view_as(pos_BKP)
        asked_BKP = live_BKP & (q_pos_BKP == pos_BKP)
        live_BKns, asked_BKns = (x_BKP.unflatten(-1, (n, s)) for x_BKP in (live_BKP, asked_BKP))
        weight_BKns = self._chunk_attention(obs, order_BKP, row_BKP, live_BKns, asked_BKns)
        asked_BKn1 = asked_BKns.sum(-1, keepdim=True)
        # As many times the mean as there are entries: of a whole prompt that is the sum.
        weight_BKns = weight_BKns * live_BKns.sum(-1, keepdim=True) / asked_BKn1.clamp_min(1)
        known_BKP = (live_BKns & (asked_BKn1 > 0)).flatten(-2)
        norm_BKC = torch.linalg.vector_norm(obs.v, dim=-1, dtype=obs.dtype)
        line_BKP = (weight_BKns.flatten(-2) * norm_BKC.gather(-1, order_BKP)).masked_fill(~known_BKP, 0)
        line_BKP = F.avg_pool1d(line_BKP, 3, stride=1, padding=1)  # zeros beyond both ends count
        out_BKC, known_BKC = torch.zeros_like(norm_BKC), torch.zeros_like(counted_BKC)
        return (
            out_BKC.scatter(-1, order_BKC, line_BKP[..., :C]),
            known_BKC.scatter(-1, order_BKC, known_BKP[..., :C]),
        )

    def _chunk_attention(
        self, obs: Observation, order_BKP: Tensor, row_BKP: Tensor, live_BKns: Tensor, asked_BKns: Tensor
    ) -> Tensor:
        """Sum over a chunk's queries of their softmax over its entries, mean over the group: [B, K, n, s].

        Args:
            order_BKP, row_BKP: columns of k, and rows of q, that lie at each place.
            live_BKns, asked_BKns: whether there is an entry, and a query.
        """
        (B, K, n, s), G, D = live_BKns.shape, obs.group, obs.k.shape[-1]
        affordable = chunk_elements(obs.k.device) // (B * K * G * s)
        together, rows = max(1, affordable // max(s, D)), max(1, min(s, affordable))
        q_BKGWD = obs.q.unflatten(1, (K, G))
        row_BKns = row_BKP.unflatten(-1, (n, s))
        parts = []
        for first in range(0, n, together):
            some = slice(first, min(first + together, n))
            at_BKpD = repeat(order_BKP[..., some.start * s : some.stop * s], "B K p -> B K p D", D=D)
            k_BK1nsD = obs.k.gather(2, at_BKpD).to(obs.dtype).unflatten(2, (-1, s))[:, :, None]
            empty_BK1n1s = ~live_BKns[:, :, None, some, None]
            total_BKns = torch.zeros_like(k_BK1nsD[:, :, 0, ..., 0])
            for row in range(0, s, rows):
                part = slice(row, min(row + rows, s))
                at_BKGpD = repeat(row_BKns[:, :, some, part], "B K n r -> B K G (n r) D", G=G, D=D)
                q_BKGnrD = q_BKGWD.gather(3, at_BKGpD).to(obs.dtype).unflatten(3, (some.stop - some.start, -1))
                a_BKGnrs = (q_BKGnrD @ k_BK1nsD.mT).masked_fill(empty_BK1n1s, -torch.inf).softmax(-1)
                # Where nothing is asked there may be no entry either, and the softmax is NaN.
                a_BKGnrs = a_BKGnrs.where(asked_BKns[:, :, None, some, part, None], 0)
                total_BKns = total_BKns + reduce(a_BKGnrs, "B K G n r s -> B K n s", "sum")
            parts.append(total_BKns / G)
        return torch.cat(parts, 2)


def standardized(x_BKC: Tensor, counted_BKC: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """(x - mean) / deviation over the counted entries of all of a row's heads, those of other ranks too; 0 for the others."""
    count_B11 = ranks.sum(counted_BKC.sum((1, 2), keepdim=True))
    x_BKC = x_BKC.where(counted_BKC, 0)
    mean_B11 = ranks.sum(x_BKC.sum((1, 2), keepdim=True)) / count_B11.clamp_min(1)
    off_BKC = (x_BKC - mean_B11).where(counted_BKC, 0)
    square_B11 = ranks.sum(off_BKC.square().sum((1, 2), keepdim=True)) / (count_B11 - 1).clamp_min(1)
    return off_BKC / square_B11.sqrt().clamp_min(LEAST_DEVIATION)


def _plain(obs: Observation, columns: slice) -> Tensor:
    """Some keys before RoPE, [B, K, C, D] in obs.dtype."""
    assert obs.rotary is not None, "this policy needs RoPE at any position (Policy.needs)"
    cos_xCD, sin_xCD = (t.to(obs.dtype) for t in obs.rotary(obs.pos[..., columns].flatten(0, 1)))
    k_xC1D = rearrange(obs.k[:, :, columns].to(obs.dtype), "B K C D -> (B K) C 1 D")
    return rearrange(unrotate(k_xC1D, cos_xCD, sin_xCD), "(B K) C 1 D -> B K C D", B=len(obs.k))

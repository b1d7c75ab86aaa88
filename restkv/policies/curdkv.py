"""CurDKV (Sengupta et al., 2025, arXiv 2509.15038): keys and values that stand out from their neighbours.

After kvpress 0.5.5. Letters: B batch rows, K KV heads, C entries of one head (columns), D head dim, P places of a
head's entries in order of position, n groups of s neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy, is_number
from restkv.policies.hashes import gaussian

WIDEST_PROJECTION = 1 << 10


@dataclass(frozen=True)
class CurDKV(Policy):
    """Score = l(k) * l(v), with l(x) = ||x||^2 over its sum among 16 neighbours; divided by the head's sum.

    The squares are approximations of leverage scores (of a CUR decomposition of the attention output). Neighbours are
    the places 0 to 15, 16 to 31, ... of the cache. `leverage`: "product", "key", "value" or "mean" of the two.
    `projection`: first multiply keys and values with a Gaussian matrix of so many columns (20 in kvpress), over its
    root; hashes of `seed` here.
    """

    name: ClassVar[str] = "curdkv"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)

    window: int = 0
    sinks: int = 4
    leverage: str = "product"
    neighbours: int | None = 16  # entries whose squares are compared; None: all of the head's
    projection: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("leverage", ("product", "key", "value", "mean"))
        valid = self.neighbours is None or _whole(self.neighbours)
        self._require(valid, "neighbours", "give a whole number of at least 1, or None for all entries of the head")
        valid = self.projection is None or (_whole(self.projection) and self.projection <= WIDEST_PROJECTION)
        self._require(valid, "projection", f"give a whole number of at least 1, at most {WIDEST_PROJECTION}, or None")
        valid = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        self._require(valid and 0 <= self.seed < 1 << 32, "seed", "give a whole number from 0 to 2^32 - 1")

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C]."""
        key_BKC, value_BKC = (self._leverage(obs, x_BKCD) for x_BKCD in (obs.k, obs.v))
        score_BKC = {
            "product": key_BKC * value_BKC,
            "key": key_BKC,
            "value": value_BKC,
            "mean": (key_BKC + value_BKC) / 2,
        }[self.leverage]
        return score_BKC / score_BKC.sum(-1, keepdim=True).clamp_min(torch.finfo(obs.dtype).tiny)

    def _leverage(self, obs: Observation, x_BKCD: Tensor) -> Tensor:
        """[B, K, C], 0 for padding."""
        (B, K, C, D), there_BKC = x_BKCD.shape, obs.pos >= 0
        if self.projection is None:
            square_BKC = torch.linalg.vector_norm(x_BKCD, dim=-1, dtype=obs.dtype).square()
        else:
            random_DS = gaussian(self.seed, obs.layer, (1, D, self.projection), x_BKCD.device)[0]
            random_DS = (random_DS / math.sqrt(self.projection)).to(obs.dtype)
            chunks = obs.chunks(B * K * max(D, self.projection))
            square_BKC = torch.cat(
                [(x_BKCD[:, :, c].to(obs.dtype) @ random_DS).square().sum(-1) for c, _ in chunks], -1
            )
        square_BKC = square_BKC.masked_fill(~there_BKC, 0)
        if self.neighbours is None:
            return square_BKC
        s = min(self.neighbours, C)
        order_BKC = obs.order[:, :: obs.group]
        line_BKP = F.pad(square_BKC.gather(-1, order_BKC), (0, -C % s))
        line_BKns = line_BKP.unflatten(-1, (-1, s))
        share_BKns = line_BKns / line_BKns.sum(-1, keepdim=True).clamp_min(torch.finfo(obs.dtype).tiny)
        return torch.zeros_like(square_BKC).scatter(-1, order_BKC, share_BKns.flatten(-2)[..., :C])


def _whole(value: object) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 1

"""KeyDiff (Park et al., 2025, arXiv 2504.15364): keys unlike the others tend to be attended to, so those stay.

Letters: B batch rows, K KV heads, C entries of one head (columns), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from restkv.observe import Observation
from restkv.policies.base import Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Score = -cos(k, anchor), the anchor being the mean of k / ||k|| over the head's entries; nothing is protected.

    Keys are compared as they lie in the cache, after RoPE. The paper reads a prompt in blocks of 128 tokens and evicts
    after each; so does a chunked prefill here, and decoding with its default interval of 128.
    """

    name: ClassVar[str] = "keydiff"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("mean",)

    window: int = 0

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C]."""
        B, K, _, D = obs.k.shape
        chunks = [columns for columns, _ in obs.chunks(B * K * D)]
        exists_BK1C = (obs.pos >= 0)[:, :, None].to(obs.dtype)
        # The sum in place of the mean: a cosine does not see the length.
        anchor_BK1D = torch.zeros(B, K, 1, D, dtype=obs.dtype, device=obs.k.device)
        for c in chunks:
            anchor_BK1D = anchor_BK1D + exists_BK1C[..., c] @ _unit(obs, c)
        anchor_BKD1 = F.normalize(anchor_BK1D, dim=-1).mT
        return -torch.cat([_unit(obs, c) @ anchor_BKD1 for c in chunks], 2)[..., 0]


def _unit(obs: Observation, columns: slice) -> Tensor:
    return F.normalize(obs.k[:, :, columns].to(obs.dtype), dim=-1)

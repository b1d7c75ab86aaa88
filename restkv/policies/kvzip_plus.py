"""KVzip+: KVzip's attention times what the entry writes into the residual stream (kvpress 0.5.5; docs/sources.md §2.9).

Letters: B batch rows, H query heads, K KV heads, G = H / K, C entries of one head (columns), W observed queries, D
head dim, F coordinates after W_O (restkv.observe.root_of).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from restkv.observe import Observation, strongest_attention
from restkv.policies.kvzip import KVzip


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """Score = max over the observed queries of A_q / ||h_q||, times ||W_O^h v||; then the maximum over the group.

    A_q is the softmax of query q, and h_q what the layer projects that query from: the residual stream after its norm.
    The ratio is what an entry adds to the stream, next to what is there. All else is as in KVzip. While decoding nobody
    knows h_q any more, and the factor is left out.
    """

    name: ClassVar[str] = "kvzip-plus"

    @property
    def needs(self) -> frozenset[str]:
        """The roots of W_O, and the lengths of the normed hidden states."""
        return frozenset({"root", "normed"})

    def importance(self, obs: Observation) -> Tensor:
        """[B, H, C]."""
        weight_BW = None
        if obs.normed is not None:  # a row of padding has no length
            weight_BW = (1 / obs.normed.to(obs.dtype)).where(obs.q_pos >= 0, 0)
        return strongest_attention(obs, weight_BW) * _written(obs)


def _written(obs: Observation) -> Tensor:
    """||W_O^h v|| of every entry and query head, [B, H, C] in obs.dtype."""
    assert obs.root is not None, "this policy needs the roots of W_O (Policy.needs)"
    (B, K), (H, _, F) = obs.v.shape[:2], obs.root.shape
    root_KDX = rearrange(
        obs.root.to(obs.dtype), "(K G) D F -> K D (G F)", K=K
    )  # one product for a group: v is not copied
    parts = []
    for columns, _ in obs.chunks(B * H * F):
        v_BKCGF = rearrange(obs.v[:, :, columns].to(obs.dtype) @ root_KDX, "B K C (G F) -> B K C G F", F=F)
        parts.append(rearrange(torch.linalg.vector_norm(v_BKCGF, dim=-1), "B K C G -> B (K G) C"))
    return torch.cat(parts, -1)

"""ExpectedAttention (Devoto et al., 2025, arXiv 2510.00636): attention that queries still to come are expected to pay.

Letters: B batch rows, H query heads, K KV heads, G = H/K, C entries of one head (columns), D head dim, T some of the
observed queries, F future positions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor

from modeling.rope import rotate, unrotate
from restkv.observe import Observation
from restkv.policies.base import TOO_MANY, Policy, is_number

QUERIES = 256  # turned back at a time: few enough for a CPU's cache
MOST_FUTURE = 1 << 16  # positions whose rotations are averaged at once


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Score = softmax over the entries of E[q] k + Var[q k] / 2, times ||v||; the group's mean or maximum comes last.

    Queries before RoPE are taken for draws of one Gaussian per head, N(mu, Sigma), estimated from the whole prompt. The
    mean rotation R of the next `future` positions turns it into that of the queries to come. With s the attention scale

        e_n = s mu^T R^T k_n + s^2/2 k_n^T R Sigma R^T k_n,        I_n = (softmax(e)_n + epsilon) ||v_n||

    is the log of the mean of exp(s q^T k_n). The first `sinks` positions are protected, and left out of the statistics
    and of the softmax. A softcap on the logits is ignored (no closed form). While decoding, mu and Sigma come from the
    queries since the last eviction. Defaults are the authors' own (kvpress).
    """

    name: ClassVar[str] = "expected-attention"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False

    window: int = 0
    sinks: int = 4
    future: int = 512  # positions R is the mean over
    covariance: bool = True  # False: leave the second term of e out
    value_norm: bool = True  # False: leave epsilon and ||v|| out
    epsilon: float = 0.0  # what an entry is worth without any attention, per unit of ||v||

    def __post_init__(self) -> None:
        super().__post_init__()
        is_whole = isinstance(self.future, int) and is_number(self.future)
        valid = is_whole and 1 <= self.future <= MOST_FUTURE
        self._require(valid, "future", f"give a whole number of at least 1, at most {MOST_FUTURE}")
        valid = is_number(self.epsilon) and 0 <= self.epsilon < TOO_MANY
        self._require(valid, "epsilon", "give a number of at least 0")

    @property
    def needs(self) -> frozenset[str]:
        """RoPE at any position: queries are turned back to where they came from, and on to the future."""
        return frozenset({"rotary"})

    @property
    def observed(self) -> int:
        """The queries since the last eviction."""
        return max(self.window, self.interval or 1)

    @property
    def observed_prompt(self) -> int:
        """All of them."""
        return sys.maxsize

    def importance(self, obs: Observation) -> Tensor:
        """Expected attention, weighted with the values' norms: [B, H, C]."""
        B, H, _, D = obs.q.shape
        K, G = obs.k.shape[1], obs.group
        mu_BHD, sigma_BHDD = self._future_queries(obs)
        # A group's D x G and D x G*D matrices side by side: one product each, and k is not copied G times.
        mu_BKDG = rearrange(mu_BHD, "B (K G) D -> B K D G", K=K)
        sigma_BKDQ = rearrange(sigma_BHDD, "B (K G) E D -> B K E (G D)", K=K)
        parts = []
        for columns, _ in obs.chunks(B * H * D):
            k_BKCD = obs.k[:, :, columns].to(obs.dtype)
            turned_BKCGD = rearrange(k_BKCD @ sigma_BKDQ, "B K C (G D) -> B K C G D", G=G)
            variance_BKCG = (turned_BKCGD * k_BKCD[:, :, :, None]).sum(-1) * obs.softmax_scale**2
            e_BKCG = k_BKCD @ mu_BKDG * obs.softmax_scale + variance_BKCG / 2
            parts.append(rearrange(e_BKCG, "B K C G -> B (K G) C"))
        counted_BHC = obs.held >= self.sinks
        e_BHC = torch.cat(parts, -1).masked_fill(~counted_BHC, torch.finfo(obs.dtype).min)
        score_BHC = e_BHC.softmax(-1) * counted_BHC
        if self.value_norm:
            norm_BKC = torch.linalg.vector_norm(obs.v, dim=-1, dtype=obs.dtype)
            score_BHC = (score_BHC + self.epsilon) * repeat(norm_BKC, "B K C -> B (K G) C", G=G)
        return score_BHC

    def _future_queries(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """R mu [B, H, D] and R Sigma R^T [B, H, D, D]; Sigma is 0 where it is not asked for."""
        B, H, _, D = obs.q.shape
        count_B = (obs.q_pos >= self.sinks).sum(-1).clamp_min(1)
        mu_BHD = torch.stack([q_BTHD.sum(1) for q_BTHD, _ in self._unrotated(obs)]).sum(0) / count_B[:, None, None]
        sigma_BHDD = mu_BHD.new_zeros(B, H, D, D)
        if self.covariance:
            for q_BTHD, counted_BT11 in self._unrotated(obs):
                off_BTHD = (q_BTHD - mu_BHD[:, None]) * counted_BT11
                sigma_BHDD = sigma_BHDD + torch.einsum("bthd,bthe->bhde", off_BTHD, off_BTHD)
            sigma_BHDD = sigma_BHDD / count_B[:, None, None, None]
        ahead_F = torch.arange(1, self.future + 1, device=obs.q.device)
        cos_B1D, sin_B1D = (t.mean(1, keepdim=True) for t in self._rotary(obs, obs.q_pos[:, -1:] + ahead_F))
        mu_BHD = rotate(mu_BHD[:, None], cos_B1D, sin_B1D)[:, 0]
        for _ in range(2):  # R Sigma R^T = (R (R Sigma)^T)^T, and Sigma is symmetric
            turned_B1XD = rotate(rearrange(sigma_BHDD, "B H E D -> B 1 (H E) D"), cos_B1D, sin_B1D)
            sigma_BHDD = rearrange(turned_B1XD, "B 1 (H E) D -> B H D E", H=H)
        return mu_BHD, sigma_BHDD

    def _unrotated(self, obs: Observation) -> Iterator[tuple[Tensor, Tensor]]:
        """The observed queries before RoPE [B, T, H, D], in parts; those that do not count are 0 (counted [B, T, 1, 1])."""
        for start in range(0, obs.q.shape[2], QUERIES):
            pos_BT = obs.q_pos[:, start : start + QUERIES]
            cos_BTD, sin_BTD = self._rotary(obs, pos_BT)
            counted_BT1 = (pos_BT >= self.sinks)[..., None]
            q_BTHD = obs.q[:, :, start : start + QUERIES].transpose(1, 2).to(obs.dtype)
            yield unrotate(q_BTHD, cos_BTD, sin_BTD) * counted_BT1[..., None], counted_BT1[..., None]

    def _rotary(self, obs: Observation, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        assert obs.rotary is not None, "this policy needs RoPE at any position (Policy.needs)"
        cos_BTD, sin_BTD = obs.rotary(pos_BT)
        return cos_BTD.to(obs.dtype), sin_BTD.to(obs.dtype)

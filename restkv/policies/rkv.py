"""R-KV (Cai et al., 2025, arXiv 2505.24133): attention, less what other keys say already; for long reasoning.

Letters: B batch rows, K KV heads, G query heads of each, C entries of one head (columns), D head dim, W observed
queries; k some KV heads, w some queries, r some entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import reduce
from torch import Tensor

from restkv import pooling
from restkv.observe import Observation
from restkv.policies.base import Policy, is_number
from restkv.pooling import WIDEST


@dataclass(frozen=True)
class RKV(Policy):
    """Score = lambda * importance - (1 - lambda) * redundancy, after the authors' code (docs/sources.md §2.10).

    importance: the largest logits of a group's heads; softmax over the past entries, mean over the last 8 queries,
    maximum over 7 neighbours. redundancy: softmax over the head's entries n of the mean over its entries i of cos(k_i,
    k_n), after RoPE, with 0 for n = i, and for the newest n that i is similar to (a cosine above 0.5; for the oldest
    entry, where there is none): of entries that say the same the newest is not held to be redundant.

    Meant for decoding, every 128 tokens; a prompt's redundancy takes the time of its attention. Preset "released" has
    the lambda that the code's class begins with, 0.07; the paper's runs have 0.1.
    """

    name: ClassVar[str] = "rkv"
    exchanges: ClassVar[str | None] = "nothing"
    observes: ClassVar[bool] = False  # redundancy is among the entries that there are, not a probe's own
    granularities: ClassVar[tuple[str, ...]] = ("kv",)
    reductions: ClassVar[tuple[str, ...]] = ("max",)
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"mix_lambda": 0.07}}

    window: int = 8
    gqa: str = "max"
    mix_lambda: float = 0.1  # weight of importance
    kernel_size: int = 7  # entries that importance is pooled over, odd
    threshold: float = 0.5  # cosine above which two keys are similar

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.window >= 1, "window", "at least one query has to be observed; give 1 or more")
        valid = is_number(self.mix_lambda) and 0 <= self.mix_lambda <= 1
        self._require(valid, "mix_lambda", "give a number from 0 to 1")
        valid = not isinstance(self.kernel_size, bool) and self.kernel_size in range(1, WIDEST, 2)
        self._require(valid, "kernel_size", f"give an odd number of at least 1, below {WIDEST}")
        valid = is_number(self.threshold) and -1 <= self.threshold <= 1
        self._require(valid, "threshold", "give a cosine, a number from -1 to 1")

    def importance(self, obs: Observation) -> Tensor:
        """[B, K, C]."""
        past_BKC, order_BKC = obs.past[:, :: obs.group], obs.order[:, :: obs.group]
        score_BKC = pooling.over_past(
            lambda line_BKC, _: pooling.maximum(line_BKC, self.kernel_size),
            _past_attention(obs, past_BKC),
            past_BKC,
            order_BKC,
        )
        return self.mix_lambda * score_BKC - (1 - self.mix_lambda) * redundancy(obs, self.threshold)


def _past_attention(obs: Observation, past_BKC: Tensor) -> Tensor:
    """Mean over the queries of the softmax over past entries of the group's largest logits, [B, K, C] in obs.dtype."""
    G = obs.group
    seen_BW = obs.q_pos >= 0
    weight_BW = seen_BW / seen_BW.sum(-1, keepdim=True).clamp_min(1).to(obs.dtype)
    total_BKC = torch.zeros(past_BKC.shape, dtype=obs.dtype, device=obs.k.device)
    for rows in obs.rows():
        heads_k = slice(rows.heads.start // G, rows.heads.stop // G)
        logits_BkwC = reduce(rows.logits_BHWC, "B (k G) w C -> B k w C", "max", G=G)
        logits_BkwC = logits_BkwC.masked_fill(~past_BKC[:, heads_k, None], -torch.inf)
        highest_Bkw1 = logits_BkwC.amax(-1, keepdim=True).clamp_min(torch.finfo(obs.dtype).min)
        a_BkwC = (logits_BkwC - highest_Bkw1).exp()  # 0 throughout for a query that sees nothing of the past
        a_BkwC = a_BkwC / a_BkwC.sum(-1, keepdim=True).clamp_min(torch.finfo(obs.dtype).tiny)
        total_BKC[:, heads_k] += (weight_BW[:, None, None, rows.queries] @ a_BkwC)[:, :, 0]
    return total_BKC


def redundancy(obs: Observation, threshold: float) -> Tensor:
    """How much a head's other keys say what each says (see RKV), [B, K, C] in obs.dtype: sums to 1, 0 for padding."""
    B, K, C, D = obs.k.shape
    there_BKC = obs.pos >= 0
    count_BK1 = there_BKC.sum(-1, keepdim=True).clamp_min(1)
    oldest_BK1 = obs.pos.masked_fill(~there_BKC, torch.iinfo(obs.pos.dtype).max).argmin(-1, keepdim=True)
    total_BKC = torch.zeros(B, K, C, dtype=obs.dtype, device=obs.k.device)
    for rows, index_r in obs.chunks(B * K * max(C, D)):
        unit_BKrD = _unit(obs, rows)
        parts = [unit_BKrD @ _unit(obs, columns).mT for columns, _ in obs.chunks(B * K * max(len(index_r), D))]
        cos_BKrC = torch.cat(parts, -1).masked_fill(~there_BKC[:, :, None], 0)
        cos_BKrC = cos_BKrC.scatter(-1, index_r.expand(B, K, -1)[..., None], 0)
        # Of the similar ones the newest; -1 where there is none.
        newest_BKr1, at_BKr1 = obs.pos[:, :, None].where(cos_BKrC > threshold, -1).max(-1, keepdim=True)
        at_BKr1 = at_BKr1.where(newest_BKr1 >= 0, oldest_BK1[..., None])
        cos_BKrC = cos_BKrC.scatter(-1, at_BKr1, 0)
        total_BKC = total_BKC + (cos_BKrC * there_BKC[:, :, rows, None]).sum(2)
    mean_BKC = (total_BKC / count_BK1).masked_fill(~there_BKC, torch.finfo(obs.dtype).min)
    return mean_BKC.softmax(-1) * there_BKC


def _unit(obs: Observation, columns: slice) -> Tensor:
    k_BKCD = obs.k[:, :, columns].to(obs.dtype)
    return k_BKCD / (torch.linalg.vector_norm(k_BKCD, dim=-1, keepdim=True) + 1e-8)

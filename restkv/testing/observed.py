"""Random observations: ragged rows, scattered padding, poisoned where nobody may look; and what the engine adds to them.

Letters: B batch rows, H query heads, K KV heads, X K or H, C entries (columns), W observed queries, D head dim, E hidden width,
T positions, S kinds of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from restkv.observe import Observation, group_root_of, root_of, weighted_attention
from restkv.policies import Policy

POISON = 1e4  # finite, as what lies in unused slots always is


def observation(
    seed: int = 0,
    *,
    rows: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 4,
    columns: int = 24,
    head_dim: int = 4,
    width: int = 12,
    dtype: torch.dtype = torch.float64,
    ragged: bool = False,
    shuffled: bool = False,
    per_head: bool = False,
    spread: float = 1.0,
    **options: Any,
) -> tuple[Observation, Tensor]:
    """A random observation and its W_O [E, H, D], both float64 unless `dtype` says otherwise.

    Args:
        ragged: rows with fewer queries, heads with fewer entries, gaps between positions, padding anywhere.
        shuffled: columns in any order.
        per_head: query heads with entries of their own (`keep`).
        spread: scale of the queries.
        options: further fields of Observation, such as softcap or sliding_window.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    heads = kv_heads * group
    q_BHWD = normal(rows, heads, queries, head_dim) * spread
    k_BKCD, v_BKCD = normal(rows, kv_heads, columns, head_dim), normal(rows, kv_heads, columns, head_dim)
    w_o_EHD = normal(width, heads, head_dim)
    pos_BKC = torch.full((rows, kv_heads, columns), -1)
    q_pos_BW = torch.full((rows, queries), -1)
    keep_BHC = torch.ones(rows, heads, columns, dtype=torch.bool)
    for b in range(rows):
        real = integer(0, min(queries, columns)) if ragged else min(queries, columns)
        entries = [integer(real, columns) if ragged else columns for _ in range(kv_heads)]
        length = max(entries) + (integer(0, 20) if ragged else 0)
        q_pos_BW[b, queries - real :] = torch.arange(length - real, length)
        for head, count in enumerate(entries):
            past = torch.randperm(length - real, generator=random)[: count - real].sort().values
            place = torch.randperm(columns, generator=random)[:count]
            place = place if shuffled else place.sort().values
            pos_BKC[b, head, place] = torch.cat([past, torch.arange(length - real, length)])
        if per_head:
            dropped_HC = torch.rand(heads, columns, generator=random) < 0.3
            keep_BHC[b] = ~(dropped_HC & (pos_BKC[b].repeat_interleave(group, 0) < length - real))
    obs = Observation(
        q_BHWD.to(dtype),
        q_pos_BW,
        k_BKCD.to(dtype),
        v_BKCD.to(dtype),
        pos_BKC,
        root_of(w_o_EHD),
        head_dim**-0.5,
        keep=keep_BHC if per_head else None,
        **options,
    )
    return poisoned(obs, POISON), w_o_EHD


def poisoned(obs: Observation, value: float) -> Observation:
    """The same observation with `value` wherever there is no query and no entry."""
    padding_BKC1, nobody_B1W1 = (obs.pos < 0)[..., None], (obs.q_pos < 0)[:, None, :, None]
    return replace(
        obs,
        q=obs.q.masked_fill(nobody_B1W1, value),
        k=obs.k.masked_fill(padding_BKC1, value),
        v=obs.v.masked_fill(padding_BKC1, -value),
    )


def root_for(policy: Policy, w_o_EHD: Tensor, kv_heads: int) -> Tensor | None:
    """What a policy asks for in `needs`: [H, D, F], [K, G, D, F], or nothing."""
    if "group_root" in policy.needs:
        return group_root_of(w_o_EHD, kv_heads)
    return root_of(w_o_EHD) if "root" in policy.needs else None


def rotary(frequencies: Sequence[float], factor: float = 1.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """RoPE of these frequencies as Observation.rotary, scaled by `factor` as YaRN does."""

    def at(pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        angle_BTF = pos_BT.clamp_min(0)[..., None] * torch.tensor(frequencies, dtype=torch.float64)
        angle_BTD = torch.cat([angle_BTF, angle_BTF], -1)
        return angle_BTD.cos() * factor, angle_BTD.sin() * factor

    return at


def sizes_of(obs: Observation) -> Tensor:
    """Lengths [B, S, W] of hidden states as queries may come from: those of the queries, and others."""
    length_BW = torch.linalg.vector_norm(obs.q.transpose(1, 2).flatten(2), dim=-1)
    return torch.stack([length_BW, 1 + length_BW.sqrt()], 1)


def collected(policy: Policy, obs: Observation) -> Tensor:
    """Attention the entries collect from the observed queries: [B, H, C] per query head, or the mean over each group."""
    mass_BHC = weighted_attention(obs, (obs.q_pos >= 0).to(obs.dtype))
    return mass_BHC if policy.granularity == "query" else mass_BHC.unflatten(1, (-1, obs.group)).mean(2)


def protected(policy: Policy, pos_BKC: Tensor, newest_B: Tensor, budgets: Sequence[int]) -> Tensor:
    """Bool [B, K, C]: what no score can evict, the newest position of each row being `newest_B`."""
    oldest_B = newest_B - torch.tensor([policy.newest(budget) for budget in budgets])
    kept_BKC = (pos_BKC > oldest_B[:, None, None]) | (pos_BKC < policy.sinks)
    for start, end in policy.protect:
        kept_BKC = kept_BKC | ((pos_BKC >= start) & (pos_BKC < end))
    return kept_BKC & (pos_BKC >= 0)


def prepared(policy: Policy, obs: Observation, w_o_EHD: Tensor, budgets: Sequence[int] | None = None) -> Observation:
    """The observation with all that the policy needs to keep as many entries of each row (None: its own budget, or all)."""
    if budgets is None:
        budgets = [policy.budget if isinstance(policy.budget, int) else obs.pos.shape[-1]] * len(obs.pos)
    half = obs.q.shape[-1] // 2
    return replace(
        obs,
        root=root_for(policy, w_o_EHD, obs.k.shape[1]),
        mass=collected(policy, obs) if "mass" in policy.needs else None,
        rotary=rotary([1.0 / 10**i for i in range(half)]) if "rotary" in policy.needs else None,
        sizes=sizes_of(obs) if "normed" in policy.needs else None,
        protected=protected(policy, obs.pos, obs.q_pos[:, -1], budgets),
        budget_B=torch.tensor(budgets),
        budgets=tuple(budgets),
        layer=1,
        num_layers=4,
    )

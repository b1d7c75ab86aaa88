"""Random observations for the policy tests: ragged rows, scattered padding, poisoned where nobody may look."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from restkv.observe import Observation, group_root_of, root_of

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
    **options,
) -> tuple[Observation, torch.Tensor]:
    """An observation and its W_O [E, H, D].

    ragged: rows with fewer queries, heads with fewer entries, gaps between positions, padding anywhere.
    shuffled: columns in any order. per_head: query heads with entries of their own (`keep`). spread: scale of the queries.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=random))

    heads = kv_heads * group
    q = normal(rows, heads, queries, head_dim) * spread
    k, v = normal(rows, kv_heads, columns, head_dim), normal(rows, kv_heads, columns, head_dim)
    w_o = normal(width, heads, head_dim)
    pos = torch.full((rows, kv_heads, columns), -1)
    q_pos = torch.full((rows, queries), -1)
    keep = torch.ones(rows, heads, columns, dtype=torch.bool)
    for b in range(rows):
        real = integer(0, min(queries, columns)) if ragged else min(queries, columns)
        entries = [integer(real, columns) if ragged else columns for _ in range(kv_heads)]
        length = max(entries) + (integer(0, 20) if ragged else 0)
        q_pos[b, queries - real :] = torch.arange(length - real, length)
        for head, count in enumerate(entries):
            past = torch.randperm(length - real, generator=random)[: count - real].sort().values
            place = torch.randperm(columns, generator=random)[:count]
            place = place if shuffled else place.sort().values
            pos[b, head, place] = torch.cat([past, torch.arange(length - real, length)])
        if per_head:
            dropped = torch.rand(heads, columns, generator=random) < 0.3
            keep[b] = ~(dropped & (pos[b].repeat_interleave(group, 0) < length - real))
    k[pos < 0], v[pos < 0] = POISON, -POISON
    q.transpose(1, 2)[q_pos < 0] = POISON
    obs = Observation(
        q.to(dtype),
        q_pos,
        k.to(dtype),
        v.to(dtype),
        pos,
        root_of(w_o),
        head_dim**-0.5,
        keep=keep if per_head else None,
        **options,
    )
    return obs, w_o


def root_for(policy, w_o, kv_heads):
    """What a policy asks for in `needs`."""
    if "group_root" in policy.needs:
        return group_root_of(w_o, kv_heads)
    return root_of(w_o) if "root" in policy.needs else None


shapes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "queries": st.integers(1, 6),
        "columns": st.integers(1, 24),
        "head_dim": st.integers(1, 5),
        "width": st.integers(1, 9),
        "ragged": st.booleans(),
        "shuffled": st.booleans(),
        "softcap": st.sampled_from([None, 1.5]),
        "sliding_window": st.sampled_from([None, 1, 5, 30]),
    }
)

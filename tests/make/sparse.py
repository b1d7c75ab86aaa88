"""Random queries, keys and listed blocks for sparse attention, and prompts that are read by small patterns."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from modeling.layers import Decoder
from modeling.sparse import BlockMap, reachable
from restkv.engine import Engine
from restkv.patterns import AShape, FlexPrefill, Pattern, VerticalSlash
from restkv.policies import Policy
from restkv.session import Session

SHAPES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 70),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 8]),
        "size": st.sampled_from([4, 8, 16]),
        "window": st.sampled_from([None, None, 1, 5, 16, 40]),
        "softcap": st.sampled_from([None, None, 2.0]),
        "seed": st.integers(0, 1 << 20),
        "share": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    }
)


def tensors(
    seed: int, length: int, kv_heads: int, group: int, head_dim: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q [H, L, D], k and v [K, L, D] in float64."""
    random = torch.Generator().manual_seed(seed)
    q_HLD = 2 * torch.randn(kv_heads * group, length, head_dim, generator=random, dtype=torch.float64)
    k_KLD, v_KLD = torch.randn(2, kv_heads, length, head_dim, generator=random, dtype=torch.float64)
    return q_HLD, k_KLD, v_KLD


def random_map(seed: int, heads: int, length: int, size: int, window: int | None, share: float) -> BlockMap:
    blocks = -(-length // size)
    listed = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < share
    diagonal = torch.eye(blocks, dtype=torch.bool)
    return BlockMap((listed | diagonal) & reachable(blocks, size, window, torch.device("cpu")), size)


LENGTH = 190


SMALL: list[Pattern] = [
    AShape(block=32, sinks=10, local=40),
    VerticalSlash(block=32, vertical=30, slash=50),
    FlexPrefill(block=32, gamma=0.5, min_budget=32),
    FlexPrefill(block=32, gamma=0.5, min_budget=32, tau=2.0),
]


def run(model: Decoder, policy: Policy, ids: list[int], prefill: str | Pattern, backend: str = "sdpa") -> Session:
    session = Session(Engine(model, backend), policy, [len(ids)], 4, prefill=prefill)
    session.prefill([ids])
    return session

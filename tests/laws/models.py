"""The random models of the laws: everything that a model may have and an eviction may trip over."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from make.small import small_model
from modeling.layers import Block, Decoder
from restkv.testing.models import exact

MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "windows": st.lists(st.sampled_from([None, None, 4, 9, 30]), min_size=1, max_size=3).map(tuple),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 6]),
        "hidden": st.just(12),
        "thetas": st.sampled_from([(100.0,), (100.0, 7.0)]),
        "fused": st.booleans(),
        "qk_norm": st.booleans(),
        "qkv_bias": st.booleans(),
        "post_norms": st.booleans(),
        "softcap": st.sampled_from([None, None, 1.5]),
    }
)


@lru_cache(maxsize=64)
def model_of(double: bool, softcap: float | None, **traits: Any) -> Decoder:
    model = small_model(**traits)
    model = exact(model) if double else model
    parts: list[Decoder | Block] = [model, *model.blocks]
    for part in parts:  # `exact` takes no capped model; attention itself caps in float64
        part.config = replace(part.config, attn_softcap=softcap)
    return model

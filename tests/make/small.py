"""Very small random models built from a ModelConfig alone, for tests that need many of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from modeling.config import ModelConfig, RopeConfig
from modeling.layers import Decoder
from restkv import engine as steps
from restkv.engine import Engine
from restkv.lm import LM
from restkv.masking import evict

VOCAB = 23


def small_model(
    seed: int = 0,
    *,
    windows: tuple[int | None, ...] = (None, None),
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    hidden: int = 24,
    fused: bool = True,
    thetas: tuple[float, ...] = (100.0,),
    **traits: Any,
) -> Decoder:
    """A float32 decoder with one layer per entry of `windows`; layer i uses rope i modulo their number.

    Weights are large enough that attention is neither flat nor one-hot, and norms and biases are not constants.
    """
    layers = len(windows)
    config = ModelConfig(
        family="small",
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=4096,
        ropes=tuple(RopeConfig("default", theta, head_dim) for theta in thetas),
        layer_rope=tuple(i % len(thetas) for i in range(layers)),
        windows=windows,
        attn_scale=head_dim**-0.5,
        **traits,
    )
    model = Decoder(config, fused).requires_grad_(False).eval()
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4, generator=random))
        else:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5, generator=random)
    return model


def small_ids(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def small_lm(backend: str = "sdpa", eos: tuple[int, ...] = (), **traits: Any) -> LM:
    """A small model without a tokenizer; `eos` are the ids that end its answers."""
    lm = LM(small_model(**traits), None, backend)
    lm.config = dataclasses.replace(lm.config, eos_token_ids=eos)
    return lm


def eagerly(engine: Engine) -> Engine:
    """A compiled engine's sessions, with their padding, whose steps are the eager twins."""
    for name, run in (("decode", steps._decode), ("hidden", steps.step)):
        setattr(engine, name, lambda *arguments, run=run: run(*arguments, backend="sdpa"))
    engine.evict = partial(evict, regions=False)  # type: ignore[method-assign]
    return engine

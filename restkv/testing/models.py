"""Very small random models, made from a ModelConfig alone: for laws and tests that need many of them, and no files.

Letters: V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modeling.config import ModelConfig, RopeConfig
from modeling.errors import ConfigError
from modeling.families.registry import FAMILIES, config_from_dict
from modeling.layers import Decoder, RMSNorm, linear, softcap
from restkv.lm import LM

VOCAB = 23
SLIDING = 9  # positions that a sliding layer of tiny_lm sees


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

    Args:
        windows: per layer, how many positions a query sees; None for all before it.
        traits: further fields of ModelConfig, such as qk_norm=True.

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
    return _drawn(Decoder(config, fused), seed)


def tiny_lm(family: str, seed: int = 0, *, layers: int = 3, backend: str = "sdpa") -> LM:
    """A random model of a family, as its config.json would have it, in float32 and without a tokenizer: give it token ids.

    Args:
        family: a `model_type` of config.json, such as "llama", "mistral", "gemma2" or "qwen2" ("gemma3" is "gemma3_text").
            Where its layers slide, they see 9 positions.
        backend: "sdpa" (eager), or "flex" (compiled).
    Raises:
        ConfigError: no such family; the line names those there are.
    """
    raw = {
        "model_type": family if family in FAMILIES else f"{family}_text" if f"{family}_text" in FAMILIES else family,
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if raw["model_type"] not in FAMILIES:
        raise ConfigError(f"tiny_lm({family!r}): no such family; choose from {', '.join(FAMILIES)}")
    try:
        config = config_from_dict(raw | {"sliding_window": SLIDING}, f"tiny_lm({family!r})")
    except ConfigError:  # a family without sliding layers refuses to have any
        config = config_from_dict(raw, f"tiny_lm({family!r})")
    return LM(_drawn(Decoder(config), seed), None, backend)


def _drawn(model: Decoder, seed: int) -> Decoder:
    """The model with random weights."""
    model = model.requires_grad_(False).eval()
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
    """A small_model of these traits without a tokenizer; `eos` are the ids that end its answers."""
    lm = LM(small_model(**traits), None, backend)
    lm.config = dataclasses.replace(lm.config, eos_token_ids=eos)
    return lm


class _ExactNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * (1 + self.weight if self.offset else self.weight)


class _ExactDecoder(Decoder):
    def head(self, x: Tensor) -> Tensor:
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return softcap(linear(self.norm(x), weight), self.config.final_softcap)


def exact(model: Decoder) -> Decoder:
    """The model in float64 throughout: its norms and logits [..., V] too, which a Decoder computes in float32."""
    model = model.double()
    model.__class__ = _ExactDecoder
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = _ExactNorm
    return model

"""Tiny random checkpoints of every family, as data: name -> function that returns a transformers config.

The cases cover G = H / K of 1, 2, 3, 4, 6, 7 and 8, head_dim of 16, 64, 80, 96, 128 and 256, tied and untied heads,
windows shorter than POSITIONS, and ropes whose trained length is far below it.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import Tensor

POSITIONS = 300  # length of the test prompts
TRAINED = 64  # trained length of stretched ropes
VOCAB = 131


def _config(
    make: type,
    heads: int,
    kv_heads: int,
    head_dim: int | None = None,
    layers: int = 2,
    hidden: int | None = None,
    **more,
) -> transformers.PreTrainedConfig:
    if head_dim is not None:
        more["head_dim"] = head_dim
    if hidden is None:
        hidden = heads * 8 if head_dim else heads * 16
    return make(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.8 / hidden**0.5,  # of such weights attention is neither flat nor one-hot, logits vary by 1
        **{"max_position_embeddings": 512, **more},
    )


def _llama(*shape: int, **more) -> transformers.PreTrainedConfig:
    return _config(transformers.LlamaConfig, *shape, **more)


def _rope(kind: str, theta: float = 10_000.0, **more) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **more}


CASES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama2": lambda: _llama(4, 4),
    "llama3": lambda: _llama(8, 2, rope_parameters=_rope("default", 500_000.0)),
    "llama31": lambda: _llama(
        6,
        2,
        64,
        tie_word_embeddings=True,
        rope_parameters=_rope(
            "llama3",
            500_000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=TRAINED,
        ),
    ),
    "llama_linear": lambda: _llama(4, 2, 80, rope_parameters=_rope("linear", factor=4.0)),
    "llama_dynamic": lambda: _llama(
        4, 2, 96, max_position_embeddings=TRAINED, rope_parameters=_rope("dynamic", factor=2.0)
    ),
    "llama_yarn": lambda: _llama(
        4, 2, 128, rope_parameters=_rope("yarn", factor=8.0, original_max_position_embeddings=TRAINED)
    ),
    "llama_yarn_mscale": lambda: _llama(
        4,
        1,
        rope_parameters=_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=TRAINED,
            mscale=0.7,
            mscale_all_dim=1.3,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama_yarn_factor": lambda: _llama(
        4,
        2,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=TRAINED, attention_factor=1.25),
    ),
    "llama_biases": lambda: _llama(4, 2, attention_bias=True, mlp_bias=True),
    "mistral_v01": lambda: _config(transformers.MistralConfig, 8, 2, sliding_window=40),
    "mistral_v03": lambda: _config(
        transformers.MistralConfig, 4, 2, sliding_window=None, rope_parameters=_rope("default", 1e6)
    ),
    "mistral_nemo": lambda: _config(transformers.MistralConfig, 4, 1, 64, hidden=80, sliding_window=None),
    "gemma1": lambda: _config(transformers.GemmaConfig, 8, 1, 256),
    "gemma2": lambda: _config(
        transformers.Gemma2Config,
        4,
        2,
        64,
        layers=3,
        sliding_window=48,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2_uncapped": lambda: _config(
        transformers.Gemma2Config,
        3,
        1,
        16,
        tie_word_embeddings=False,
        sliding_window=POSITIONS * 2,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
    ),
    "gemma3": lambda: _config(
        transformers.Gemma3TextConfig,
        4,
        1,
        256,
        layers=3,
        sliding_window=32,
        sliding_window_pattern=3,
        query_pre_attn_scalar=96,
        rope_parameters={
            "full_attention": _rope("linear", 1e6, factor=8.0),
            "sliding_attention": _rope("default", 10_000.0),
        },
    ),
    "gemma3_capped": lambda: _config(
        transformers.Gemma3TextConfig,
        2,
        2,
        64,
        layers=2,
        sliding_window=2,  # of 1, transformers' cache keeps everything instead of nothing (5.23)
        layer_types=["full_attention", "sliding_attention"],
        final_logit_softcapping=2.0,
        tie_word_embeddings=False,
    ),
    "qwen2": lambda: _config(transformers.Qwen2Config, 14, 2),
    "qwen2_window": lambda: _config(
        transformers.Qwen2Config,
        6,
        1,
        layers=3,
        use_sliding_window=True,
        sliding_window=50,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen25_yarn": lambda: _config(
        transformers.Qwen2Config,
        7,
        1,
        tie_word_embeddings=True,
        rope_parameters=_rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=TRAINED),
    ),
    "qwen3": lambda: _config(transformers.Qwen3Config, 8, 1, 128),
    "qwen3_window": lambda: _config(
        transformers.Qwen3Config,
        8,
        4,
        64,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def save_case(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Build the case's random model in float32, save it to the folder and return it (eager attention, eval mode)."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(CASES[name](), attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norm weights and biases start as constants, which would hide how they are used
            parameter.data += torch.empty_like(parameter).uniform_(-0.4, 0.4)
    model.save_pretrained(folder)
    return model


def prompt_ids(length: int = POSITIONS, seed: int = 0) -> Tensor:
    """Random token ids [L]."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, ids_L: Tensor, prompt: int | None = None) -> Tensor:
    """transformers' logits [L, V] float32: all in one pass, or `prompt` tokens in one pass and the rest one by one."""
    # A dynamic rope keeps the longest length it has met; a pass over one token makes it forget.
    model(ids_L[None, :1], use_cache=False)
    if prompt is None:
        return model(ids_L[None], use_cache=False).logits[0].float()
    return logits_of_pieces(model, [ids_L[:prompt], *ids_L[prompt:].split(1)]).float()


@torch.no_grad()
def logits_of_pieces(model: transformers.PreTrainedModel, pieces: Iterable[Tensor]) -> Tensor:
    """transformers' logits [L, V], piece after piece over one cache."""
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    return torch.cat([model(piece[None], **{name: cache}).logits[0] for piece in pieces])

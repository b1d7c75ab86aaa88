"""Gemma 1, 2 and 3 (text): scaled embeddings, norms with 1 + weight, tanh GELU, tied head.

Gemma 2 adds four norms a block, softcaps and a window on every other layer; Gemma 3 drops the softcaps for q/k norms,
slides five layers of six, and gives sliding layers a rotary embedding of their own.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from tokenizers import normalizers, pre_tokenizers

from modeling.config import THETA, ModelConfig, RopeConfig, Shape, Sizes, decoder_config, read_shape, rope_config
from modeling.errors import RestKVWarning
from modeling.fields import FULL, SLIDING, Fields, shown
from modeling.text.classes import (
    BY_BYTES,
    SPACE,
    BuiltClass,
    Pipeline,
    Settings,
    UsualClass,
    sentencepiece_decoder,
)

SIZES_1 = Sizes(
    vocab_size=256_000,
    hidden_size=3072,
    intermediate_size=24_576,
    num_layers=28,
    num_heads=16,
    num_kv_heads=16,
    max_positions=8192,
    head_dim=256,
)
SIZES_2 = Sizes(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    max_positions=8192,
    head_dim=256,
)
SIZES_3 = dataclasses.replace(SIZES_2, vocab_size=262_208, max_positions=131_072)


def _gemma(fields: Fields, shape: Shape, family: str, **features: Any) -> ModelConfig:
    if fields.flag("use_bidirectional_attention", False):
        raise fields.refuse("'use_bidirectional_attention' is true; only causal models can generate")
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        shape,
        family=family,
        tie_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(1,),
        norm_offset=True,
        embed_scale=shape.hidden_size**0.5,
        qkv_bias=bias,
        o_bias=bias,
        **features,
    )


def gemma(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma"."""
    activation = fields.text("hidden_act") or "gelu_pytorch_tanh"
    if activation == "gelu":  # the first releases say "gelu" and mean the tanh form they were trained with
        activation = "gelu_pytorch_tanh"
    return _gemma(fields, read_shape(fields, SIZES_1), "gemma", activation=activation)


def gemma2(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma2": even layers slide."""
    shape = read_shape(fields, SIZES_2)
    return _gemma(
        fields,
        shape,
        "gemma2",
        activation=fields.text("hidden_activation") or "gelu_pytorch_tanh",
        post_norms=True,
        windows=fields.layer_windows(shape.num_layers, fields.window(default=4096), lambda layer: layer % 2 == 0),
        attn_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=fields.softcap("attn_logit_softcapping", 50.0),
        final_softcap=fields.softcap("final_logit_softcapping", 30.0),
    )


def _pattern(fields: Fields) -> int:
    """Every how many layers one is global; of no importance where `layer_types` says which."""
    return 6 if fields.raw.get("layer_types") is not None else fields.integer("sliding_window_pattern", 6)


def _gemma3_ropes(fields: Fields, shape: Shape) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of the global and of the sliding layers.

    `rope_parameters` has a part for each. Where it has neither, transformers passes over what else it says, and so do we,
    with a warning where that differs from the defaults.
    """
    nested = fields.section("rope_parameters")
    parts = Fields(nested, f"{fields.place}: rope_parameters")
    scaling = fields.section("rope_scaling")
    full = (parts.section(FULL) or {"rope_type": "default"}) | scaling
    local = parts.section(SLIDING)
    if "type" in scaling and "rope_type" in full and scaling["type"] != full["rope_type"]:
        kind, read = shown(scaling["type"]), shown(full["rope_type"])
        raise fields.refuse(
            f"'type' of 'rope_scaling' is {kind}, of which transformers reads {read}; call it 'rope_type'"
        )
    if any(entry.get("truncate", True) is not True for entry in (nested, full, local)):
        raise fields.refuse("'truncate' of the rope parameters is not true; with a rope per layer type it is not read")
    theta = fields.number("rope_theta", 1_000_000.0, THETA)
    local_theta = fields.number("rope_local_base_freq", 10_000.0, THETA)
    size = {"head_dim": shape.head_dim, "max_positions": shape.max_positions}
    ropes = (
        rope_config(fields, full, theta=theta, **size),
        rope_config(fields, local, theta=local_theta, **size),
    )
    flat = {key: value for key, value in nested.items() if key not in (FULL, SLIDING)}
    if flat and flat not in ({"rope_type": "default"}, {"rope_type": "default", "rope_theta": ropes[0].theta}):
        warnings.warn(
            f"{fields.place}: 'rope_parameters' says {shown(flat)} outside of the parts {FULL!r} and {SLIDING!r}; "
            "that is ignored, as by transformers",
            RestKVWarning,
            stacklevel=2,
        )
    return ropes


def gemma3(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma3_text": every sixth layer (or `sliding_window_pattern`-th) is global."""
    if fields.softcap("attn_logit_softcapping", None) is not None:
        raise fields.refuse("'attn_logit_softcapping' is set; Gemma 3 has none, set it to null")
    shape = read_shape(fields, SIZES_3)
    pattern = _pattern(fields)
    windows = fields.layer_windows(
        shape.num_layers, fields.window(default=4096), lambda layer: (layer + 1) % pattern != 0
    )
    return _gemma(
        fields,
        shape,
        "gemma3",
        activation=fields.text("hidden_activation") or "gelu_pytorch_tanh",
        post_norms=True,
        qk_norm=True,
        windows=windows,
        ropes=_gemma3_ropes(fields, shape),
        layer_rope=tuple(0 if window is None else 1 for window in windows),
        attn_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=fields.softcap("final_logit_softcapping", None),
    )


def _words(_: Settings) -> Pipeline:
    words = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    return normalizers.Replace(" ", SPACE), words, sentencepiece_decoder(strips=False)


MODEL_TYPES = {
    "gemma": ("GemmaForCausalLM", gemma),
    "gemma2": ("Gemma2ForCausalLM", gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", gemma3),
}
TOKENIZERS = (
    BuiltClass(
        "GemmaTokenizer",
        _words,
        BY_BYTES,
        {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
        knows_unk=True,
    ),
)
USUAL_TOKENIZERS = dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), UsualClass("GemmaTokenizer"))

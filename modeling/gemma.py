"""Gemma 1, 2 and 3 (text): scaled embeddings, norms with 1 + weight, tanh GELU, tied head.

Gemma 2 adds four norms a block, softcaps and a window on every other layer; Gemma 3 drops the softcaps for q/k norms,
slides five layers of six, and gives sliding layers a rotary embedding of their own.
"""

from __future__ import annotations

from typing import Any

from tokenizers import normalizers, pre_tokenizers

from modeling.config import Fields, ModelConfig, decoder_config, rope_config
from modeling.tokenizer_classes import (
    BY_BYTES,
    SPACE,
    BuiltClass,
    Pipeline,
    Settings,
    UsualClass,
    sentencepiece_decoder,
)


def _gemma(fields: Fields, family: str, **features: Any) -> ModelConfig:
    if fields.flag("use_bidirectional_attention", False):
        raise fields.refuse("'use_bidirectional_attention' is true; only causal models can generate")
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        family=family,
        head_dim=256,
        tie_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(1,),
        norm_offset=True,
        embed_scale=fields.integer("hidden_size") ** 0.5,
        qkv_bias=bias,
        o_bias=bias,
        **features,
    )


def gemma(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma"."""
    activation = fields.text("hidden_activation") or fields.text("hidden_act") or "gelu_pytorch_tanh"
    if activation == "gelu":  # the first releases say "gelu" and mean the tanh form they were trained with
        activation = "gelu_pytorch_tanh"
    return _gemma(fields, "gemma", activation=activation)


def gemma2(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma2": even layers slide."""
    return _gemma(
        fields,
        "gemma2",
        activation=fields.text("hidden_activation") or "gelu_pytorch_tanh",
        post_norms=True,
        windows=fields.layer_windows(
            fields.integer("num_hidden_layers"), fields.window(default=4096), lambda layer: layer % 2 == 0
        ),
        attn_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=fields.softcap("attn_logit_softcapping", 50.0),
        final_softcap=fields.softcap("final_logit_softcapping", 30.0),
    )


def gemma3(fields: Fields) -> ModelConfig:
    """config.json of model_type "gemma3_text": every sixth layer (or `sliding_window_pattern`-th) is global."""
    if fields.softcap("attn_logit_softcapping", None) is not None:
        raise fields.refuse("'attn_logit_softcapping' is set; Gemma 3 has none, set it to null")
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    windows = fields.layer_windows(
        fields.integer("num_hidden_layers"), fields.window(default=4096), lambda layer: (layer + 1) % pattern != 0
    )
    nested = fields.section("rope_parameters")
    if nested and not nested.keys() & {"full_attention", "sliding_attention"}:
        raise fields.refuse("'rope_parameters' must have the parts 'full_attention' and 'sliding_attention'")
    parts = Fields(nested, f"{fields.place}: rope_parameters")
    shape = {
        "head_dim": fields.integer("head_dim", 256),
        "max_positions": fields.integer("max_position_embeddings", 131_072),
    }
    full = parts.section("full_attention") | fields.section("rope_scaling")
    local = parts.section("sliding_attention")
    return _gemma(
        fields,
        "gemma3",
        activation=fields.text("hidden_activation") or "gelu_pytorch_tanh",
        post_norms=True,
        qk_norm=True,
        windows=windows,
        ropes=(
            rope_config(fields, full, theta=fields.number("rope_theta", 1_000_000.0), **shape),
            rope_config(fields, local, theta=fields.number("rope_local_base_freq", 10_000.0), **shape),
        ),
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

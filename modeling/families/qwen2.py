"""Qwen2 and 2.5 (biases on q, k, v) and Qwen3 (q/k norm instead); windows only where the config asks for them."""

from __future__ import annotations

import dataclasses

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from modeling.config import ModelConfig, Sizes, decoder_config, read_shape
from modeling.fields import Fields
from modeling.text.classes import BY_LETTERS, END_OF_TEXT, BuiltClass, Pipeline, Settings, UsualClass, spaced

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SIZES = Sizes(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=22_016,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    max_positions=32_768,
)


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, and only with `use_sliding_window`."""
    window = fields.window(default=4096) if fields.flag("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, minimum=0)
    return fields.layer_windows(num_layers, window, lambda layer: window is not None and layer >= first)


def qwen2(fields: Fields) -> ModelConfig:
    """config.json of model_type "qwen2" (Qwen2, Qwen2.5)."""
    shape = read_shape(fields, SIZES)
    windows = _windows(fields, shape.num_layers)
    return decoder_config(fields, shape, family="qwen2", windows=windows, qkv_bias=True)


def qwen3(fields: Fields) -> ModelConfig:
    """config.json of model_type "qwen3"."""
    shape = read_shape(fields, dataclasses.replace(SIZES, head_dim=128))
    windows = _windows(fields, shape.num_layers)
    bias = fields.flag("attention_bias", False)
    return decoder_config(fields, shape, family="qwen3", windows=windows, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _words(settings: Settings) -> Pipeline:
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=spaced(settings, False), use_regex=False)
    return normalizers.NFC(), pre_tokenizers.Sequence([words, byte_level]), decoders.ByteLevel()


MODEL_TYPES = {"qwen2": ("Qwen2ForCausalLM", qwen2), "qwen3": ("Qwen3ForCausalLM", qwen3)}
TOKENIZERS = (
    BuiltClass(
        "Qwen2Tokenizer",
        _words,
        BY_LETTERS,
        dict.fromkeys(("unk_token", "eos_token", "pad_token"), END_OF_TEXT),
        plain_special=True,
    ),
)
USUAL_TOKENIZERS = {"qwen2": UsualClass("Qwen2Tokenizer", always=True), "qwen3": UsualClass("Qwen2Tokenizer")}

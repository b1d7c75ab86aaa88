"""Qwen2 and 2.5 (biases on q, k, v) and Qwen3 (q/k norm instead); windows only where the config asks for them."""

from __future__ import annotations

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from modeling.config import Fields, ModelConfig, decoder_config
from modeling.tokenizer_classes import BY_LETTERS, END_OF_TEXT, BuiltClass, Pipeline, Settings, UsualClass, spaced

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, and only with `use_sliding_window`."""
    window = fields.window(default=4096) if fields.flag("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, minimum=0)
    return fields.layer_windows(
        fields.integer("num_hidden_layers"), window, lambda layer: window is not None and layer >= first
    )


def qwen2(fields: Fields) -> ModelConfig:
    """config.json of model_type "qwen2" (Qwen2, Qwen2.5)."""
    return decoder_config(fields, family="qwen2", windows=_windows(fields), qkv_bias=True)


def qwen3(fields: Fields) -> ModelConfig:
    """config.json of model_type "qwen3"."""
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields, family="qwen3", head_dim=128, windows=_windows(fields), qk_norm=True, qkv_bias=bias, o_bias=bias
    )


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

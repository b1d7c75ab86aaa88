"""Llama 2, 3, 3.1, 3.2 and the many checkpoints that share their config: no windows, biases only when asked for."""

from __future__ import annotations

from modeling.config import ModelConfig, Sizes, decoder_config, read_shape
from modeling.fields import Fields
from modeling.text.classes import (
    BY_BYTES,
    BuiltClass,
    Pipeline,
    Settings,
    UsualClass,
    sentencepiece_decoder,
    sentencepiece_words,
    spaced,
)

SIZES = Sizes(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=None,
    max_positions=2048,
)


def llama(fields: Fields) -> ModelConfig:
    """config.json of model_type "llama"."""
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        read_shape(fields, SIZES),
        family="llama",
        bos_token_id=1,
        eos_token_ids=(2,),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _words(settings: Settings) -> Pipeline:
    if not spaced(settings, True):
        return None, sentencepiece_words("never"), sentencepiece_decoder(strips=False)
    scheme = "always" if settings.get("legacy", False) else "first"
    return None, sentencepiece_words(scheme), sentencepiece_decoder(strips=True)


def _code_words(settings: Settings) -> Pipeline:
    scheme = "first" if spaced(settings, True) else "never"
    return None, sentencepiece_words(scheme), sentencepiece_decoder(strips=True)


MODEL_TYPES = {"llama": ("LlamaForCausalLM", llama)}
TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
TOKENIZERS = (
    BuiltClass("LlamaTokenizer", _words, BY_BYTES, TOKENS, not_for_bytes=True),
    BuiltClass(
        "CodeLlamaTokenizer",
        _code_words,
        BY_BYTES,
        TOKENS | INFILLING,
        extra=tuple(INFILLING.values()),
        knows_unk=True,
        bos=True,
    ),
)
USUAL_TOKENIZERS: dict[str, UsualClass] = {}

"""Llama 2, 3, 3.1, 3.2 and the many checkpoints that share their config: no windows, biases only when asked for."""

from __future__ import annotations

from modeling.config import ModelConfig, Sizes, decoder_config, read_shape
from modeling.fields import Fields

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


MODEL_TYPES = {"llama": ("LlamaForCausalLM", llama)}

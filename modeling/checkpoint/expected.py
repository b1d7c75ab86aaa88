"""Which tensors a checkpoint must hold, by ModelConfig alone: names and shapes are computed, nothing is built."""

from __future__ import annotations

import math
from typing import NamedTuple

from modeling.checkpoint.tensor_file import STORED_DTYPES
from modeling.config import ModelConfig
from modeling.quant import GROUP, kind_of

SCALES = "_scale"  # after a matrix's name: where a quantised checkpoint keeps its scales (and zeros)


class Expected(NamedTuple):
    """What a tensor must be: its shape, and its dtype, as headers spell it, one of these."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor of the model -> its shape.

    Compared with the headers of the weights before a Decoder is built, so that a config.json that claims more than is
    there costs neither time nor memory.
    """
    c = config
    q_out, kv_out = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linears = {
        "self_attn.q_proj": (q_out, c.hidden_size, c.qkv_bias),
        "self_attn.k_proj": (kv_out, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (kv_out, c.hidden_size, c.qkv_bias),
        "self_attn.o_proj": (c.hidden_size, q_out, c.o_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), c.hidden_size)
    if c.post_norms:
        norms |= dict.fromkeys(("pre_feedforward_layernorm", "post_feedforward_layernorm"), c.hidden_size)
    if c.qk_norm:
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), c.head_dim)
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name, width in norms.items()}
    for name, (rows, columns, bias) in linears.items():
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for index in range(c.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Name of every tensor that the checkpoint's files must hold -> what it must be.

    Those of `expected_shapes`, in floating point. Where config.json says that the matrices are quantised, each is two tensors:
    its codes, int8 [N, E] or uint8 [N, E / 2], under its own name, and its scales, [N] or (scale and zero of every group)
    [N, G, 2], under that name and SCALES (see modeling/quant.py).
    """
    floating = tuple(STORED_DTYPES)
    tensors: dict[str, Expected] = {}
    for name, shape in expected_shapes(config).items():
        if config.weights is None or len(shape) == 1:
            tensors[name] = Expected(shape, floating)
        elif kind_of(config.weights, shape[1]) == "int8":
            tensors[name] = Expected(shape, ("I8",))
            tensors[name + SCALES] = Expected(shape[:1], floating)
        else:
            tensors[name] = Expected((shape[0], shape[1] // 2), ("U8",))
            tensors[name + SCALES] = Expected((shape[0], shape[1] // GROUP, 2), floating)
    return tensors


def parameter_count(config: ModelConfig) -> int:
    """How many numbers the model has, whatever each of them takes."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())

"""The two frozen dataclasses that describe a model, and the typed reading of config.json that fills them.

Sources of the names and defaults: the config.json files of the released checkpoints and the config classes of
transformers (both its layouts: `rope_theta` + `rope_scaling`, and `rope_parameters` since version 5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling.errors import ConfigError, RestKVError
from modeling.fields import FULL, MAX_HEAD_DIM, MAX_INTEGER, MAX_LAYERS, MAX_VOCAB, SLIDING, Fields, shown
from modeling.files import MAX_VALUES, read_bytes, too_many_values
from modeling.quant import WEIGHTS

QUANT_METHOD, QUANT_VERSION = "restkv", 1  # of our own quantised checkpoints (restkv/saving/checkpoint.py)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Other names under which transformers knows the same function or dtype.
SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}
SAME_DTYPE = {"float": "float32", "half": "float16"}

# What numbers of a rotary embedding may be: all tables stay finite in float32, at every position below 2^31.
THETA = (1.0, 1e15)
FACTOR = (1e-3, 1e6)
EPSILON = (1e-30, 1.0)

# Keys that transformers obeys in every family and we do not: the values they may have, and what any other would mean.
_ALONE = "the text model is one part of a larger model; use a checkpoint of the text model alone"
REFUSED_UNLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "only causal models can generate"),
    "is_encoder_decoder": ((None, False), "only models without an encoder are known"),
    "text_config": ((None,), _ALONE),
    "text_encoder": ((None,), _ALONE),
    "decoder": ((None,), _ALONE),
    "generator": ((None,), _ALONE),
    "per_layer_config": ((None, {}), "all layers must have one shape"),
    "attention_chunk_size": ((None,), "attention in chunks is not known"),
    "kv_sharing_modes": ((None,), "every layer must have keys and values of its own"),
    "num_kv_shared_layers": ((None, 0), "every layer must have keys and values of its own"),
    "fusion_config": ((None, {}), "modules as the checkpoint has them are all that is known"),
    "transformers_weights": ((None,), "weights are read from model.safetensors or its index"),
    "attribute_map": ((None, {}), "keys are read under their own names"),
    "configuration_files": (([], ["config.json"]), "only config.json is read"),
}


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding: which frequencies, and how they are stretched beyond the trained length."""

    kind: str  # one of ROPE_KINDS
    theta: float  # base of the frequencies, theta^(-2i/dim)
    dim: int  # rotated dimensions, = head_dim
    factor: float = 1.0  # how many times the trained length is to be reached; unused by "default"
    original_positions: int = 0  # trained length; used by "dynamic", "llama3", "yarn"
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_positions / this are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_positions / this stay as they are
    beta_fast: float = 32.0  # yarn: dimensions turning more often than this within the trained length stay
    beta_slow: float = 1.0  # yarn: dimensions turning less often than this are divided by factor
    truncate: bool = True  # yarn: round the two bounds outward to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied with this


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, complete: modeling/layers.py obeys these fields and knows no family names.

    Raises ConfigError when fields contradict each other.
    """

    family: str  # for display only; nothing may branch on it
    vocab_size: int  # rows of the embedding
    hidden_size: int  # width E of the residual stream
    intermediate_size: int  # width of the gated MLP
    num_layers: int
    num_heads: int  # query heads H
    num_kv_heads: int  # key/value heads K; query head h reads KV head h // (H / K)
    head_dim: int  # D; need not be hidden_size / num_heads (Mistral Nemo, Gemma, Qwen3)
    max_positions: int  # positions the checkpoint claims to handle
    ropes: tuple[RopeConfig, ...]  # the model's rotary embeddings
    layer_rope: tuple[int, ...]  # per layer: index into ropes
    windows: tuple[int | None, ...]  # per layer: a query at p sees keys at p - w < pos <= p; None = all pos <= p
    attn_scale: float  # q.k is multiplied with this
    norm_eps: float = 1e-6  # added to the mean square in every RMSNorm
    activation: str = "silu"  # of the gate, one of ACTIVATIONS
    tie_embeddings: bool = False  # the output head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query's and key's head_dim, before RoPE
    norm_offset: bool = False  # RMSNorm multiplies with 1 + weight, in float32 (Gemma)
    post_norms: bool = False  # norms after attention and after the MLP as well as before (Gemma 2 and 3)
    embed_scale: float = 1.0  # embeddings are multiplied with this, rounded to the model's dtype
    attn_softcap: float | None = None  # attention logits s become c * tanh(s / c)
    final_softcap: float | None = None  # the same for the output logits
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # generation stops at any of these
    dtype: str | None = None  # what dtype="auto" means; None = as stored
    # One of quant.WEIGHTS where the checkpoint's matrices are quantised; no part of the repr, of which fingerprints are made: a
    # model that is quantised while it is loaded is the same.
    weights: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("layer_rope", self.layer_rope), ("windows", self.windows)):
            if len(values) != self.num_layers:
                raise ConfigError(f"{name} has {len(values)} entries for {self.num_layers} layers; give one per layer")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}; "
                "query heads must share KV heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs of dimensions")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {shown(self.activation)} is unknown; known are {', '.join(ACTIVATIONS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype {shown(self.dtype)} is not supported; known are {', '.join(DTYPES)}")

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token adds to a full cache, all layers and KV heads together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


def read_json(path: Path, error: type[RestKVError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file; raises `error` with one line when it cannot be read, is no JSON, or no object."""
    content = read_bytes(path, error)
    if too_many_values(content):
        raise error(f"{path}: holds over {MAX_VALUES:,} values, more than are read; download the file again")
    try:
        value = json.loads(content.decode(), parse_int=_whole_number)
    except RecursionError:
        raise error(
            f"{path}: its lists and objects are nested too deeply; no file of a checkpoint needs that"
        ) from None
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({problem}); copy or download the file again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, must be a JSON object")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > 4300:  # more than Python converts
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model: a family's defaults for keys that its config.json leaves out, and what is read in the end."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None  # None: as many as query heads
    max_positions: int
    head_dim: int | None = None  # None: hidden_size / num_heads


@dataclass(frozen=True)
class Shape(Sizes):
    """Sizes without a None."""

    num_kv_heads: int
    head_dim: int


def read_shape(fields: Fields, default: Sizes) -> Shape:
    """The sizes that config.json gives, each within its bound, and the family's where it leaves one out.

    A null means what it means to transformers: as many KV heads as query heads, and no other size may be null but those
    that have a default which follows from the rest.
    """

    def size(key: str, otherwise: int, maximum: int = MAX_INTEGER) -> int:
        return fields.integer(key, None if key in fields.raw else otherwise, maximum=maximum)

    heads = size("num_attention_heads", default.num_heads)
    hidden = size("hidden_size", default.hidden_size)
    kv_heads = heads if "num_key_value_heads" in fields.raw else default.num_kv_heads or heads
    head_dim = default.head_dim or hidden // heads
    if default.head_dim is None and fields.raw.get("head_dim") is None and hidden % heads:
        raise fields.refuse(f"'hidden_size' {hidden} is not a multiple of {heads} heads and 'head_dim' is not given")
    return Shape(
        vocab_size=size("vocab_size", default.vocab_size, MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size", default.intermediate_size),
        num_layers=size("num_hidden_layers", default.num_layers, MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", kv_heads),
        max_positions=fields.integer("max_position_embeddings", default.max_positions),
        head_dim=fields.integer("head_dim", head_dim, maximum=MAX_HEAD_DIM),
    )


def rope_config(
    fields: Fields, entry: Mapping[str, Any], *, theta: float, head_dim: int, max_positions: int
) -> RopeConfig:
    """Translate one rotary entry (`rope_scaling`, `rope_parameters`, or one layer type's part of it).

    `theta` holds when the entry has no `rope_theta` of its own. Raises ConfigError for a kind we do not know, for a
    missing or senseless parameter, and for partial rotary embeddings.
    """
    read = Fields(entry, f"{fields.place}: rope parameters")
    kind, older = read.text("rope_type"), read.text("type")
    if kind is not None and older is not None and kind != older:
        raise read.refuse(f"'rope_type' is {shown(kind)} and 'type' is {shown(older)}; leave one of them out")
    kind = kind or older or "default"
    if kind not in ROPE_KINDS:
        raise read.refuse(f"rope type {shown(kind)} is unknown; known are {', '.join(ROPE_KINDS)}")
    partial = read.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise read.refuse(f"'partial_rotary_factor' is {partial}; only whole heads can be rotated (1.0)")
    theta = read.number("rope_theta", theta, THETA)
    if kind == "default":
        return RopeConfig(kind, theta, head_dim)
    if kind == "linear":
        return RopeConfig(kind, theta, head_dim, factor=read.number("factor", limits=FACTOR))
    if kind == "dynamic":
        if head_dim <= 2:
            raise read.refuse(f"dynamic rope needs a head_dim above 2, got {head_dim}")
        factor = read.number("factor", limits=FACTOR)
        return RopeConfig(kind, theta, head_dim, factor=factor, original_positions=max_positions)
    original = read.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
        if low >= high:
            raise read.refuse(f"'low_freq_factor' {low} must be below 'high_freq_factor' {high}")
        factor = read.number("factor", limits=FACTOR)
        return RopeConfig(kind, theta, head_dim, factor, original, low_freq_factor=low, high_freq_factor=high)
    if theta == 1.0:
        raise read.refuse("'rope_theta' is 1.0, with which all dimensions turn alike; yarn needs more")
    factor = read.number("factor", max_positions / original, FACTOR)
    return RopeConfig(
        kind,
        theta,
        head_dim,
        factor,
        original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        # To transformers a null here is a false.
        truncate=read.flag("truncate", "truncate" not in entry),
        attention_factor=_yarn_attention_factor(read, factor),
    )


def _yarn_attention_factor(read: Fields, factor: float) -> float:
    """YaRN's temperature: given, else 0.1 ln(factor) + 1 (Peng et al. 2023, Eq. 22), else DeepSeek's mscale ratio."""

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    default = temperature(1.0)
    if read.raw.get("mscale") and read.raw.get("mscale_all_dim"):
        default = temperature(read.number("mscale")) / temperature(read.number("mscale_all_dim"))
    return read.number("attention_factor", default)


def single_rope(fields: Fields, shape: Shape) -> RopeConfig:
    """The one rotary embedding of a model: `rope_scaling` if it says anything, else `rope_parameters`."""
    entry = fields.section("rope_scaling") or fields.section("rope_parameters")
    parts = sorted({SLIDING, FULL} & entry.keys())
    if parts:
        raise fields.refuse(
            f"the rope parameters have a part {parts[0]!r}, but all layers of this family share one rope"
        )
    # Some configs keep the trained length beside the rope parameters; that one wins, as in transformers.
    trained = fields.raw.get("original_max_position_embeddings")
    if trained is not None:
        entry = entry | {"original_max_position_embeddings": trained}
    theta = fields.number("rope_theta", 10_000.0, THETA)
    return rope_config(fields, entry, theta=theta, head_dim=shape.head_dim, max_positions=shape.max_positions)


def decoder_config(
    fields: Fields,
    shape: Shape,
    *,
    family: str,
    activation: str | None = None,
    tie_embeddings: bool = False,
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    windows: tuple[int | None, ...] | None = None,
    ropes: tuple[RopeConfig, ...] | None = None,
    layer_rope: tuple[int, ...] | None = None,
    attn_scale: float | None = None,
    **features: Any,
) -> ModelConfig:
    """The part of a translation that all families share.

    Keyword arguments are the family's own defaults (tie_embeddings, token ids) and what makes it different (`features`
    go to ModelConfig as they are). Without `windows` every layer sees everything, and a file that asks for a window is
    refused; without `ropes` there is one (single_rope). Raises ConfigError as ModelConfig does, and for each key of
    REFUSED_UNLESS.
    """
    weights = _quantised(fields)
    for key, (allowed, why) in REFUSED_UNLESS.items():
        if key in fields.raw and fields.raw[key] not in allowed:
            raise fields.refuse(f"{key!r} is {shown(fields.raw[key])}; {why}")
    if windows is None:
        fields.no_windows(family, shape.num_layers)
    activation = activation or fields.text("hidden_act", "silu") or "silu"
    dtype = (fields.text("dtype") or fields.text("torch_dtype") or "").removeprefix("torch.") or None
    bos = fields.token_ids("bos_token_id", () if bos_token_id is None else (bos_token_id,))
    try:
        return ModelConfig(
            family=family,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_positions=shape.max_positions,
            ropes=ropes or (single_rope(fields, shape),),
            layer_rope=layer_rope or (0,) * shape.num_layers,
            windows=windows or (None,) * shape.num_layers,
            attn_scale=shape.head_dim**-0.5 if attn_scale is None else attn_scale,
            norm_eps=fields.number("rms_norm_eps", 1e-6, EPSILON),
            activation=SAME_ACTIVATION.get(activation, activation),
            tie_embeddings=fields.flag("tie_word_embeddings", tie_embeddings),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=fields.token_ids("eos_token_id", eos_token_ids),
            dtype=None if dtype is None else SAME_DTYPE.get(dtype, dtype),
            weights=weights,
            **features,
        )
    except ConfigError as error:
        text = str(error)
        raise error if text.startswith(f"{fields.place}: ") else fields.refuse(text) from None


def _quantised(fields: Fields) -> str | None:
    """How the checkpoint's matrices are held, as `restkv quantize` says it; None where they are plain numbers.

    Raises ConfigError for what anybody else has quantised.
    """
    said = fields.section("quantization_config")
    if not said:
        return None
    method = said.get("quant_method", "unknown method")
    if method != QUANT_METHOD:
        raise fields.refuse(
            f"the weights are quantised ({shown(method)}); use the float16, bfloat16 or float32 checkpoint"
        )
    weights, version = said.get("weights"), said.get("version")
    if weights not in WEIGHTS:
        raise fields.refuse(f"quantised 'weights' are {shown(weights)}; known are {', '.join(WEIGHTS)}")
    if version != QUANT_VERSION or said.keys() != quantization_config(weights).keys():
        raise fields.refuse(
            f"the weights are quantised by version {shown(version)} of our own format, {QUANT_VERSION} is known; make the folder "
            "anew from the checkpoint that it was made of (restkv quantize)"
        )
    return weights


def quantization_config(weights: str) -> dict[str, Any]:
    """What config.json says of matrices that are held as `weights`."""
    return {"quant_method": QUANT_METHOD, "version": QUANT_VERSION, "weights": weights}

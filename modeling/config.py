"""The two frozen dataclasses that describe a model, and the typed reading of config.json that fills them.

Sources of the names and defaults: the config.json files of the released checkpoints and the config classes of
transformers (both its layouts: `rope_theta` + `rope_scaling`, and `rope_parameters` since version 5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling.errors import ConfigError, RestKVError
from modeling.files import MAX_VALUES, read_bytes, too_many_values

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
            raise ConfigError(f"activation {self.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not supported; known are {', '.join(DTYPES)}")

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
        value = json.loads(content.decode())
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({problem}); copy or download the file again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, must be a JSON object")
    return value


class Fields:
    """The keys of a config.json, read with their types. A missing or ill-typed one is named with its place.

    A key that is null counts as absent, except where null means "none" (window, softcap).
    """

    def __init__(self, raw: Mapping[str, Any], place: str = "config.json"):
        self.raw = raw
        self.place = place

    def refuse(self, text: str) -> ConfigError:
        return ConfigError(f"{self.place}: {text}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; ConfigError when absent and without default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"{key!r} is missing; it must be a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(f"{key!r} is {value!r}; it must be a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; ConfigError when absent and without default."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"{key!r} is missing; it must be a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(f"{key!r} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(f"{key!r} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"{key!r} is {value!r}; it must be a string")
        return value

    def section(self, key: str) -> dict[str, Any]:
        """A nested object, {} when absent or null."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self.refuse(f"{key!r} is {value!r}; it must be an object")
        return value

    def softcap(self, key: str, default: float | None) -> float | None:
        """A softcap: absent means the family's default, null means none."""
        if key in self.raw and self.raw[key] is None:
            return None
        return default if key not in self.raw else self.number(key)

    def window(self, default: int | None) -> int | None:
        """`sliding_window`: absent means the family's default, null means none."""
        if "sliding_window" in self.raw and self.raw["sliding_window"] is None:
            return None
        return default if "sliding_window" not in self.raw else self.integer("sliding_window")

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One id or a list of ids; absent or null means the default."""
        value = self.raw.get(key)
        if value is None:
            return default
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.refuse(f"{key!r} is {value!r}; it must be a token id or a list of them")
        return tuple(ids)

    def layer_windows(
        self, num_layers: int, window: int | None, is_sliding: Callable[[int], bool]
    ) -> tuple[int | None, ...]:
        """Window of each layer: by `layer_types` when given, else where is_sliding(layer) says so.

        Raises ConfigError for an unknown layer type, a wrong count, or a sliding layer without a window.
        """
        names = {True: "sliding_attention", False: "full_attention"}
        types = self.raw.get("layer_types") or [names[is_sliding(i)] for i in range(num_layers)]
        unknown = sorted({str(t) for t in types} - set(names.values()))
        if unknown:
            raise self.refuse(f"layer type {unknown[0]!r} is unknown; known are {', '.join(names.values())}")
        if len(types) != num_layers:
            raise self.refuse(f"'layer_types' has {len(types)} entries for {num_layers} layers; give one per layer")
        if names[True] in types and window is None:
            raise self.refuse("a layer has sliding attention but 'sliding_window' is not set; give its length")
        return tuple(window if t == names[True] else None for t in types)


def rope_config(
    fields: Fields, entry: Mapping[str, Any], *, theta: float, head_dim: int, max_positions: int
) -> RopeConfig:
    """Translate one rotary entry (`rope_scaling`, `rope_parameters`, or one layer type's part of it).

    `theta` holds when the entry has no `rope_theta` of its own. Raises ConfigError for a kind we do not know, for a
    missing parameter, and for partial rotary embeddings.
    """
    read = Fields(entry, f"{fields.place}: rope parameters")
    kind = read.text("rope_type") or read.text("type") or "default"
    if kind not in ROPE_KINDS:
        raise read.refuse(f"rope type {kind!r} is unknown; known are {', '.join(ROPE_KINDS)}")
    partial = read.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise read.refuse(f"'partial_rotary_factor' is {partial}; only whole heads can be rotated (1.0)")
    theta = read.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(kind, theta, head_dim)
    if kind == "linear":
        return RopeConfig(kind, theta, head_dim, factor=read.number("factor"))
    if kind == "dynamic":
        if head_dim <= 2:
            raise read.refuse(f"dynamic rope needs a head_dim above 2, got {head_dim}")
        return RopeConfig(kind, theta, head_dim, factor=read.number("factor"), original_positions=max_positions)
    # Some configs keep the trained length beside the rope parameters; that one wins, as in transformers.
    inner = read.integer("original_max_position_embeddings", max_positions)
    original = fields.integer("original_max_position_embeddings", inner)
    if kind == "llama3":
        low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
        if low >= high:
            raise read.refuse(f"'low_freq_factor' {low} must be below 'high_freq_factor' {high}")
        factor = read.number("factor")
        return RopeConfig(kind, theta, head_dim, factor, original, low_freq_factor=low, high_freq_factor=high)
    factor = read.number("factor", max_positions / original)
    return RopeConfig(
        kind,
        theta,
        head_dim,
        factor,
        original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=read.flag("truncate", True),
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


def decoder_config(
    fields: Fields,
    *,
    family: str,
    head_dim: int | None = None,
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

    Keyword arguments are the family's own defaults (head_dim, tie_embeddings, token ids) and what makes it different
    (`features` go to ModelConfig as they are). Without `windows` every layer sees everything; without `ropes` there is
    one, read from `rope_parameters` or `rope_scaling` and `rope_theta`. Raises ConfigError as ModelConfig does.
    """
    raw = fields.raw
    quantized = fields.section("quantization_config")
    if quantized:
        raise fields.refuse(
            f"the weights are quantised ({quantized.get('quant_method', 'unknown method')!r}); "
            "use the float16, bfloat16 or float32 checkpoint"
        )
    hidden, heads, layers = (fields.integer(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if head_dim is None and raw.get("head_dim") is None and hidden % heads:
        raise fields.refuse(f"'hidden_size' {hidden} is not a multiple of {heads} heads and 'head_dim' is not given")
    head_dim = fields.integer("head_dim", head_dim or hidden // heads)
    max_positions = fields.integer("max_position_embeddings")
    if ropes is None:
        entry = fields.section("rope_scaling") or fields.section("rope_parameters")
        theta = fields.number("rope_theta", 10_000.0)
        ropes = (rope_config(fields, entry, theta=theta, head_dim=head_dim, max_positions=max_positions),)
    bos = fields.token_ids("bos_token_id", () if bos_token_id is None else (bos_token_id,))
    try:
        return ModelConfig(
            family=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            max_positions=max_positions,
            ropes=ropes,
            layer_rope=layer_rope or (0,) * layers,
            windows=windows or (None,) * layers,
            attn_scale=head_dim**-0.5 if attn_scale is None else attn_scale,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            activation=activation or fields.text("hidden_act", "silu") or "silu",
            tie_embeddings=fields.flag("tie_word_embeddings", tie_embeddings),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=fields.token_ids("eos_token_id", eos_token_ids),
            dtype=fields.text("dtype") or fields.text("torch_dtype"),
            **features,
        )
    except ConfigError as error:
        raise fields.refuse(str(error)) from None

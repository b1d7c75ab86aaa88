"""Random config.json contents of every family: valid ones with some keys changed, for tests that compare or attack.

`plausible` draws values that transformers might obey, `hostile` draws anything that JSON can hold.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

LAYERS = 3
VOCAB = 61
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
VALID = {family: {"model_type": family, "architectures": [name], **TINY} for family, name in ARCHITECTURES.items()}
VALID["gemma3_text"]["sliding_window_pattern"] = 2  # so that there are layers of both types
ABSENT = object()  # drawn for a key that is to be left out


def _pick(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def rope_entry(draw: st.DrawFn) -> dict[str, Any]:
    """One set of rotary parameters, not always complete."""
    kind = draw(_pick("default", "linear", "dynamic", "llama3", "yarn", "yarn", "longrope"))
    entry: dict[str, Any] = {draw(_pick("rope_type", "rope_type", "type")): kind}
    if draw(st.booleans()):
        entry["rope_theta"] = draw(_pick(50, 1e4, 5e5))
    if kind != "default" or draw(_pick(True, False, False, False)):
        entry["factor"] = draw(_pick(2, 4.0, 1.0, 0.5))
    if kind == "llama3":
        entry |= {"low_freq_factor": draw(_pick(1, 1.0, 2.0)), "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn") and draw(st.booleans()):
        entry["original_max_position_embeddings"] = draw(_pick(16, 32.0))
    if kind == "yarn":
        more = {
            "beta_fast": _pick(8, 16.0, None),
            "beta_slow": _pick(1, 2.0, 8.0),
            "mscale": _pick(0.7, 1, 0),
            "mscale_all_dim": _pick(1.3, 0),
            "attention_factor": _pick(1.25, None),
            "truncate": _pick(True, False, None),
        }
        entry |= {key: draw(values) for key, values in more.items() if draw(_pick(True, False, False))}
        if draw(_pick(True, False, False, False)):
            entry["factor"] = None
    if draw(_pick(True, False, False, False, False, False)):
        entry["partial_rotary_factor"] = draw(_pick(1.0, 0.5))
    return entry


NESTED = st.fixed_dictionaries(
    {}, optional={"full_attention": rope_entry() | st.none(), "sliding_attention": rope_entry() | st.none()}
)
TYPES = st.lists(_pick("full_attention", "sliding_attention", "attention"), min_size=LAYERS, max_size=LAYERS)
ACTIVATIONS = _pick("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu", None)
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "num_key_value_heads": _pick(ABSENT, None, 1, 4),
    "head_dim": _pick(ABSENT, None, 4, 16),
    "max_position_embeddings": _pick(ABSENT, 16, 4096, None),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "rms_norm_eps": _pick(1e-6, 1e-2, 1.0),
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "sliding_window": _pick(None, 2, 7, 100, 0),
    "layer_types": TYPES | TYPES | st.none() | _pick([], ["full_attention"]),
    "use_sliding_window": st.booleans(),
    "max_window_layers": _pick(0, 1, 2, 28),
    "sliding_window_pattern": _pick(ABSENT, 1, 2, 3, 2.0),
    "_sliding_window_pattern": _pick(1, 2),
    "query_pre_attn_scalar": _pick(4, 24, 256),
    "final_logit_softcapping": _pick(None, 0.5, 3.0),
    "attn_logit_softcapping": _pick(None, 0.5, 3.0),
    "rope_theta": _pick(50.0, 1e6, 10000),
    "rope_local_base_freq": _pick(50.0, 1e5),
    "rope_scaling": rope_entry() | rope_entry() | _pick(None, {}),
    "rope_parameters": rope_entry() | NESTED | _pick(None, {}),
    "partial_rotary_factor": _pick(1.0, 0.5, None),
    "original_max_position_embeddings": _pick(16, 32),
    "is_causal": _pick(True, False, None),
    "use_bidirectional_attention": _pick(True, False, None),
    "attention_chunk_size": _pick(None, 8),
    "per_layer_config": _pick(None, {}),
    "pretraining_tp": _pick(1, 2),
    "attention_dropout": _pick(0.0, 0.5),
    "pad_token_id": _pick(None, 0, -1),
    "eos_token_id": _pick(None, 3, [3, 5]),
    "bos_token_id": _pick(None, 4),
    "use_cache": st.booleans(),
    "unheard_of": _pick(None, 5, "x"),
}
ROPE_KEYS = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
WINDOW_KEYS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern")


@st.composite
def plausible(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A config.json of the family in which a few keys say something other than TINY."""
    raw = dict(VALID[family])
    theme = draw(_pick(ROPE_KEYS, WINDOW_KEYS, tuple(KEYS), tuple(KEYS)))
    for key in draw(st.lists(st.sampled_from(theme), unique=True, max_size=4)):
        value = draw(KEYS[key])
        raw.pop(key, None)
        if value is not ABSENT:
            raw[key] = value
    return raw


ODD_NUMBERS = _pick(
    0, -1, 1, 2, 3, 7, 63, 64.0, 0.5, 1e-320, 1e300, 2**31 - 1, 2**31, 2**63, 10**400, -0.0, 1.0000001
) | _pick(float("nan"), float("inf"), float("-inf"), True, 1e5, 1e9)
ODD_TEXTS = _pick("", "x\ny", "\x1b[2J", "‮", "\ud800", "silu", "default", "yarn", "torch.bfloat16", "a" * 10_000)
ANYTHING = st.recursive(
    st.none() | st.booleans() | ODD_NUMBERS | ODD_TEXTS | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_pick("rope_type", "type", "factor", "full_attention", "x"), inner, max_size=4)
    ),
    max_leaves=6,
)
ROPE_PARAMETERS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
)


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of some family with values of any type and size in some of its keys."""
    raw = dict(draw(plausible(draw(_pick(*VALID)))))
    known = sorted({*KEYS, *TINY, "architectures", "model_type", "dtype", "torch_dtype", "quantization_config"})
    for key in draw(st.lists(st.sampled_from(known), unique=True, max_size=3)):
        raw[key] = draw(ANYTHING)
    place = draw(_pick(None, None, "rope_scaling", "rope_parameters"))
    if place:
        entry = draw(rope_entry())
        for key in draw(st.lists(st.sampled_from(ROPE_PARAMETERS), unique=True, max_size=3)):
            entry[key] = draw(ODD_NUMBERS | ANYTHING)
        raw[place] = draw(_pick(entry, {"full_attention": entry}, {"sliding_attention": entry, "full_attention": {}}))
    return raw

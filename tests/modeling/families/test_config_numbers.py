"""Logits of configs drawn at random: those of transformers, or a refusal that names what is not computed."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from make.config_draws import ABSENT, VALID, VOCAB, plausible
from make.effort import many
from make.families import reference_logits
from modeling.checkpoint.loading import load_model
from modeling.errors import ConfigError, RestKVWarning
from modeling.families.registry import config_from_dict
from twins.dense import DenseCache, dense_logits

LENGTH, PROMPT = 40, 30  # tokens in all, and in the first pass of those over a cache
IDS = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3))


def their_model(raw: dict[str, Any], folder: Path) -> transformers.PreTrainedModel | None:
    """transformers' random model of a config.json, its weights in the folder; None where it cannot be built or run."""
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * (
                0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            )
        with torch.no_grad():
            model(IDS[None], use_cache=False)
    except Exception:
        return None
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    return model


def compared(raw: dict[str, Any]) -> str:
    """How a config fared: "equal", "refused" by us, or "invalid" to transformers as well."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", RestKVWarning)
        folder = Path(name)
        reference = their_model(raw, folder)
        try:
            ours = config_from_dict(raw)
        except ConfigError:
            return "refused" if reference else "invalid"
        if reference is None:
            return "invalid"
        config = reference.config
        ends = config.eos_token_id
        assert ours.eos_token_ids == (() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,))
        assert ours.bos_token_id == config.bos_token_id
        assert ours.max_positions == config.max_position_embeddings
        model = load_model(folder)
        assert_close(dense_logits(model, IDS), reference_logits(reference, IDS))
        cache = DenseCache()
        pieces = [dense_logits(model, piece, cache) for piece in [IDS[:PROMPT], *IDS[PROMPT:].split(1)]]
        assert_close(torch.cat(pieces), reference_logits(reference, IDS, PROMPT))
        return "equal"


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


def compare_many(family: str, examples: int) -> None:
    fates: list[str] = []

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        fates.append(compared(data.draw(plausible(family))))

    compare()
    assert fates.count("equal") > len(fates) / 10, "too few were compared to prove anything"


@pytest.mark.parametrize("family", VALID)
def test_drawn_configs_give_transformers_logits_or_are_refused(family):
    compare_many(family, 8)


@pytest.mark.slow
@pytest.mark.parametrize("family", VALID)
def test_many_drawn_configs_give_transformers_logits_or_are_refused(family):
    compare_many(family, many(1500, 15))


HALVES = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 50.0}
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, layers of both types": ("mistral", {"layer_types": HALVES, "sliding_window": 8}),
    "mistral, layer_types null": ("mistral", {"layer_types": None, "sliding_window": 8}),
    "an older name of full attention": ("qwen3", {"layer_types": ["attention"] * 3}),
    "qwen2, types": ("qwen2", {"layer_types": HALVES, "use_sliding_window": True, "sliding_window": 8}),
    "qwen2, a window that is not used": ("qwen2", {"sliding_window": 8, "max_window_layers": 0}),
    "qwen3, null window": ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen2, no head_dim": ("qwen2", {"head_dim": ABSENT}),
    "llama, full types": ("llama", {"layer_types": ["full_attention"] * 3, "sliding_window": 8}),
    "gemma2, types": ("gemma2", {"layer_types": HALVES[::-1], "sliding_window": 8}),
    "gemma2, hidden_act is not read": ("gemma2", {"hidden_act": "relu"}),
    "gemma, hidden_activation is not read": ("gemma", {"hidden_activation": "silu"}),
    "gemma3, _sliding_window_pattern is not read": (
        "gemma3_text",
        {"_sliding_window_pattern": 2, "sliding_window_pattern": ABSENT, "sliding_window": 8},
    ),
    "gemma3, sliding_window_pattern": ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 8}),
    "gemma3, a pattern as float": ("gemma3_text", {"sliding_window_pattern": 2.0, "sliding_window": 8}),
    "gemma3, rope_scaling": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 50}),
    "gemma3, rope_local_base_freq": ("gemma3_text", {"rope_local_base_freq": 50}),
    "gemma3, types over pattern": (
        "gemma3_text",
        {"sliding_window_pattern": 3, "layer_types": HALVES, "sliding_window": 8},
    ),
    "gemma3, flat rope": ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma3, flat rope that is passed over": (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3, one part null": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 50.0}}},
    ),
    "gemma3, trained length beside the parts": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": YARN}, "original_max_position_embeddings": 32},
    ),
    "llama, trained length beside the rope": ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 32}),
    "llama, rope_scaling over rope_parameters": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 50.0}},
    ),
    "llama, empty rope_scaling": ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_theta": 50.0}}),
    "rope_scaling of type default": ("mistral", {"rope_scaling": {"type": "default"}, "rope_theta": 50.0}),
    "yarn, null factor": ("llama", {"rope_scaling": YARN | {"factor": None}}),
    "yarn, null truncate": (
        "llama",
        {"rope_scaling": YARN | {"truncate": None, "original_max_position_embeddings": 24}},
    ),
    "yarn, one bound": ("llama", {"rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 4.0}}),
    "yarn, bounds exchanged": ("llama", {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 4.0}}),
    "llama3 with whole numbers": (
        "llama",
        {"rope_scaling": YARN | {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
    ),
    "llama, null KV heads": ("llama", {"num_key_value_heads": None}),
    "llama, no positions": ("llama", {"max_position_embeddings": ABSENT}),
    "llama, swish": ("llama", {"hidden_act": "swish"}),
    "llama, gelu_new": ("llama", {"hidden_act": "gelu_new"}),
    "no ends": ("llama", {"eos_token_id": None, "bos_token_id": None}),
    "keys of training": ("llama", {"attention_dropout": 0.5, "pretraining_tp": 4, "use_cache": False}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, window": ("llama", {"sliding_window": 8}, "'sliding_window' is 8, but llama has no sliding layers"),
    "llama, types": ("llama", {"layer_types": HALVES, "sliding_window": 8}, "'layer_types' has 'sliding_attention'"),
    "gemma, window": ("gemma", {"sliding_window": 8}, "'sliding_window' is 8, but gemma has no sliding layers"),
    "gemma, bidirectional": ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is true"),
    "not causal": ("qwen3", {"is_causal": False}, "'is_causal' is False; only causal models"),
    "not said to be causal": ("qwen3", {"is_causal": None}, "'is_causal' is None; only causal models"),
    "chunks": ("mistral", {"attention_chunk_size": 8, "sliding_window": None}, "'attention_chunk_size' is 8"),
    "gemma3, rope by its older name": (
        "gemma3_text",
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "'type' of 'rope_scaling' is 'linear', of which transformers reads 'default'",
    ),
    "gemma3, truncate": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
        "'truncate' of the rope parameters is not true",
    ),
    "llama, rope by layer type": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 50.0}}},
        "the rope parameters have a part 'full_attention'",
    ),
    "half a head rotated": (
        "llama",
        {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "'partial_rotary_factor' is 0.5",
    ),
    "proportional": ("llama", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional' is unknown"),
    "mistral, sliding without a window": (
        "mistral",
        {"layer_types": HALVES, "sliding_window": None},
        "a layer has sliding attention but 'sliding_window' is not set",
    ),
}


def changed(family: str, change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (VALID[family] | change).items() if value is not ABSENT}


@pytest.mark.parametrize("name", EQUAL)
def test_what_transformers_reads_is_read(name):
    assert compared(changed(*EQUAL[name])) == "equal"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name):
    family, change, text = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(changed(family, change))
    assert text in str(caught.value)


def test_flat_rope_parameters_that_transformers_passes_over_are_warned_of():
    with pytest.warns(RestKVWarning, match="'rope_parameters' says .*'factor': 8.0.* outside of the parts"):
        config_from_dict(changed(*EQUAL["gemma3, flat rope that is passed over"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_dict(changed(*EQUAL["gemma3, flat rope"]))


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("torch.bfloat16", "bfloat16"), ("torch.float32", "float32"), ("half", "float16"), ("float", "float32")],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_by_their_other_names(key, spelled, meant):
    assert config_from_dict(VALID["llama"] | {key: spelled}).dtype == meant

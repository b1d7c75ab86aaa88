"""config.json in, ModelConfig out: both layouts, the released files' spellings, and every refusal."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from make.families import CASES
from modeling.errors import ConfigError, RestKVError
from modeling.families.registry import FAMILIES, config_from_dict, read_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 12}

# As the folders on the hub say it (transformers 4 layout), reduced to what decides something.
RELEASED = {
    "Llama-2-7b": LLAMA
    | {"max_position_embeddings": 4096, "rope_scaling": None, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
    "Llama-3.1-8B": LLAMA
    | {
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "vicuna-16k": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "Mistral-7B-v0.1": LLAMA
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096, "rope_theta": 10000.0},
    "Mistral-7B-v0.3": LLAMA
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "rope_theta": 1e6},
    "Mistral-Nemo": LLAMA
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 128},
    "gemma-2b": LLAMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"},
    "gemma-2-2b": LLAMA
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 224,
        "sliding_window": 4096,
        "cache_implementation": "hybrid",
    },
    "gemma-3-1b": GEMMA3
    | {"rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma-3-4b text": GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    "Qwen2.5-7B": LLAMA
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 28,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
    },
    "Qwen2.5-7B yarn": LLAMA
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen2 sliding": LLAMA
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 2,
    },
    "Qwen3-8B": LLAMA
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "rope_theta": 1000000},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_mean_what_transformers_reads_in_them(name):
    raw = json.loads(json.dumps(RELEASED[name]))
    ours = config_from_dict(raw)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    types = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.num_layers
    if ours.family == "mistral" and theirs.sliding_window:
        types = ["sliding_attention"] * ours.num_layers
    assert ours.windows == tuple(theirs.sliding_window if t == "sliding_attention" else None for t in types)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for layer, index in enumerate(ours.layer_rope):
        entry = theirs.rope_parameters
        entry = entry.get(types[layer], entry)
        rope = ours.ropes[index]
        assert (rope.kind, rope.theta) == (entry["rope_type"], entry["rope_theta"])
        assert rope.factor == entry.get("factor", 1.0)
        if rope.kind in ("llama3", "yarn"):
            assert rope.original_positions == entry["original_max_position_embeddings"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.activation == (getattr(theirs, "hidden_activation", None) or theirs.hidden_act)
    assert ours.attn_scale == (getattr(theirs, "query_pre_attn_scalar", None) or ours.head_dim) ** -0.5
    assert ours.attn_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize("name", CASES)
def test_both_rope_layouts_mean_the_same(name):
    """transformers 5 writes rope_parameters; files before it have rope_theta, rope_scaling, rope_local_base_freq."""
    new = CASES[name]().to_dict()
    old = json.loads(json.dumps(new))
    parameters = old.pop("rope_parameters")
    if "full_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    old["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    key = "rope_type" if new["model_type"] == "gemma3_text" else "type"  # "type" alone is passed over in Gemma 3
    old["rope_scaling"] = None if kind == "default" else parameters | {key: kind}
    assert config_from_dict(old) == config_from_dict(new)


def test_architectures_stand_in_for_an_absent_model_type():
    raw = {k: v for k, v in RELEASED["Qwen3-8B"].items() if k != "model_type"}
    assert config_from_dict(raw).family == "qwen3"


def test_absent_windows_take_the_family_default_and_null_means_none():
    raw = {k: v for k, v in RELEASED["Mistral-7B-v0.1"].items() if k != "sliding_window"}
    assert config_from_dict(raw).windows == (4096,) * 3
    assert config_from_dict(raw | {"sliding_window": None}).windows == (None,) * 3


def test_yarn_without_a_factor_reaches_from_the_trained_length_to_max_positions():
    rope = config_from_dict(LLAMA | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}).ropes[0]
    assert (rope.factor, rope.original_positions) == (4.0, 64)


def test_kv_bytes_count_keys_and_values_of_every_layer():
    config = config_from_dict(LLAMA)
    assert config.group == 2
    assert config.kv_bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 16 * 2
    assert config.kv_bytes_per_token(torch.float32) == 2 * config.kv_bytes_per_token(torch.bfloat16)


def rope(**entry) -> dict:
    return LLAMA | {"rope_scaling": entry}


REFUSED = [
    (LLAMA | {"model_type": "mamba"}, "model_type 'mamba' is not a known family; known are llama, mistral"),
    (LLAMA | {"model_type": None, "architectures": None}, "no model_type, and architectures []"),
    (LLAMA | {"model_type": 7}, "'model_type' is 7; it must be a string"),
    (LLAMA | {"architectures": "LlamaForCausalLM"}, "'architectures' is 'LlamaForCausalLM'; it must be a list"),
    (LLAMA | {"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification' is not supported"),
    (rope(rope_type="longrope"), "rope type 'longrope' is unknown; known are default, linear, dynamic"),
    (rope(type="mrope"), "rope type 'mrope' is unknown"),
    (rope(type="linear"), "rope parameters: 'factor' is missing"),
    (rope(type="linear", factor="2"), "'factor' is '2'; it must be a number above 0"),
    (rope(type="linear", factor=-1), "'factor' is -1; it must be a number above 0"),
    (rope(rope_type="llama3", factor=2.0), "'low_freq_factor' is missing"),
    (rope(rope_type="llama3", factor=2.0, low_freq_factor=4, high_freq_factor=4), "must be below 'high_freq_factor'"),
    (rope(type="dynamic", factor=2.0) | {"head_dim": 2}, "dynamic rope needs a head_dim above 2"),
    (LLAMA | {"rope_scaling": "linear"}, "'rope_scaling' is 'linear'; it must be an object"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5; only whole heads"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "'partial_rotary_factor'"),
    (LLAMA | {"hidden_act": "relu"}, "activation 'relu' is unknown; known are silu"),
    (LLAMA | {"hidden_size": None}, "'hidden_size' is missing"),
    (LLAMA | {"vocab_size": True}, "'vocab_size' is True; it must be a whole number of at least 1"),
    (LLAMA | {"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
    (LLAMA | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    (LLAMA | {"head_dim": 15}, "head_dim 15 is odd"),
    (LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5}, "'hidden_size' 64 is not a multiple of 5 heads"),
    (LLAMA | {"rms_norm_eps": 0}, "'rms_norm_eps' is 0"),
    (LLAMA | {"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'; it must be true or false"),
    (LLAMA | {"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    (LLAMA | {"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'; it must be a token id or a list of them"),
    (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised ('gptq')"),
    (GEMMA3 | {"layer_types": ["full_attention"] * 11 + ["chunked"]}, "layer type 'chunked' is unknown"),
    (GEMMA3 | {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for 12 layers"),
    (GEMMA3 | {"sliding_window": None}, "'sliding_window' is not set"),
    (GEMMA3 | {"sliding_window": 0}, "'sliding_window' is 0"),
    (GEMMA3 | {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is set"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "only causal models can generate"),
    (GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 8.0}}, "'type' of 'rope_scaling' is 'linear'"),
]


@pytest.mark.parametrize(("raw", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_cannot_be_obeyed_is_refused_by_name_in_one_line(raw, text):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw, "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    assert text in message
    assert "\n" not in message


def test_a_config_must_give_every_layer_its_window_and_rope():
    config = config_from_dict(LLAMA)
    with pytest.raises(ConfigError, match="windows has 1 entries for 3 layers"):
        dataclasses.replace(config, windows=(None,))


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 9]}, (5, 9)),
        ({"eos_token_id": None}, ()),
        ({"eos_token_id": []}, ()),
    ],
)
def test_generation_config_overrides_the_eos_ids(tmp_path, generation, want):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_token_ids == want


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no config.json; give the folder of a Hugging Face checkpoint"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "holds a list, must be a JSON object"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, content, text):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RestKVError, match=text) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_family_is_exercised():
    assert {CASES[name]().model_type for name in CASES} == set(FAMILIES)

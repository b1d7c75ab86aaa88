"""Every key of a config.json that transformers reads for our families has been decided about.

transformers' own sources are walked: the annotated fields of the config classes, the names that those classes take out of
their keyword arguments, and the attributes that the models, masks, caches and rotary embeddings read of a config. A key
that is in none of the tables below fails here, as it does after an update of transformers that reads something new.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from make.config_draws import VALID
from modeling.config import REFUSED_UNLESS
from modeling.errors import ConfigError
from modeling.families.registry import config_from_dict

# Obeyed wherever transformers obeys it; single families may refuse a value (tests/modeling/families/test_config.py).
READ = {
    "architectures",
    "attention_bias",
    "attn_logit_softcapping",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization_config",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "torch_dtype",
    "use_bidirectional_attention",
    "use_sliding_window",
    "vocab_size",
}
# Within rope_scaling and rope_parameters.
READ_OF_ROPE = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "truncate",
    "type",
    "full_attention",
    "sliding_attention",
}
NO_EFFECT = {
    "_attn_implementation": "another kernel only",
    "attn_implementation": "another kernel only",
    "_attn_implementation_internal": "never read back",
    "_experts_implementation": "no experts here",
    "_experts_implementation_internal": "no experts here",
    "experts_implementation": "no experts here",
    "_commit_hash": "only a label",
    "_name_or_path": "only a label",
    "name_or_path": "only a label",
    "_output_attentions": "shows, changes nothing",
    "output_attentions": "shows, changes nothing",
    "output_hidden_states": "shows, changes nothing",
    "return_dict": "form of results",
    "_rope_type_labels": "other models only",
    "attention_dropout": "training only",
    "auto_map": "remote code, unread",
    "base_model_pp_plan": "several devices only",
    "base_model_tp_plan": "several devices only",
    "chunk_size_feed_forward": "other models only",
    "gradient_checkpointing": "training only",
    "id2label": "classifiers only",
    "label2id": "classifiers only",
    "num_labels": "classifiers only",
    "problem_type": "classifiers only",
    "initializer_range": "weights are loaded",
    "pad_token_id": "padding is masked",
    "pretraining_tp": "unread since 5",
    "transformers_version": "only a label",
    "use_cache": "same numbers, slower",
    "_sliding_window_pattern": "overwritten, never read",
    "first_k_dense_replace": "mixtures of experts",
    "mlp_layer_types": "only validated here",
    "mtp_layer_types": "assistant heads only",
    "mtp_mlp_layer_types": "assistant heads only",
    "mtp_per_layer_config": "assistant heads only",
    "num_mtp_layers": "assistant heads only",
    "long_factor": "longrope is refused",
    "short_factor": "longrope is refused",
    "embed_dim": "only validated here",
    "num_heads": "only validated here",
    "number_of_conv_states": "no convolutions here",
    "image_size": "images only",
    "image_token_id": "images only",
    "layer_norm_eps": "images only",
    "mm_tokens_per_image": "images only",
    "patch_size": "images only",
    "vision_config": "images only",
}
NOT_KEYS = {  # methods, properties, and arguments of calls that share the name of the mapping
    "_from_auto",
    "_from_pipeline",
    "_configuration_file",
    "_post_init_done",
    "cache_dir",
    "code_revision",
    "commit_message",
    "force_download",
    "get_text_config",
    "gguf_file",
    "is_heterogeneous",
    "local_files_only",
    "nested_rope_parameter_keys",
    "proxies",
    "repo_id",
    "return_unused_kwargs",
    "revision",
    "standardize_rope_params",
    "sub_configs_defaults",
    "subfolder",
    "token",
    "trust_remote_code",
    "validate",
    "validate_rope",
    "",
}
DECIDED = READ | READ_OF_ROPE | set(NO_EFFECT) | set(REFUSED_UNLESS) | NOT_KEYS

# model_type -> (folder of transformers.models, config class). A mistral with layer_types is run as ministral.
CLASSES = {
    "llama": ("llama", "LlamaConfig"),
    "mistral": ("mistral", "MistralConfig"),
    "gemma": ("gemma", "GemmaConfig"),
    "gemma2": ("gemma2", "Gemma2Config"),
    "gemma3_text": ("gemma3", "Gemma3TextConfig"),
    "qwen2": ("qwen2", "Qwen2Config"),
    "qwen3": ("qwen3", "Qwen3Config"),
}
SHARED = ("masking_utils", "cache_utils", "modeling_rope_utils")
FOLDERS = [folder for folder, _ in CLASSES.values()] + ["ministral"]


def fields_of(model_type: str) -> dict[str, Any]:
    """Annotated fields of a family's config class, those of PreTrainedConfig among them, and their defaults."""
    cls = getattr(transformers, CLASSES[model_type][1])
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    parents = [cls, transformers.PreTrainedConfig]  # plain classes before 5.3
    parameters = [p for c in parents for p in inspect.signature(c.__init__).parameters.values()]
    return {p.name: p.default for p in reversed(parameters) if p.name not in ("self", "kwargs")}


@functools.cache
def tree_of(module: str) -> ast.AST | None:
    try:
        return ast.parse(inspect.getsource(importlib.import_module(f"transformers.{module}")))
    except ImportError:  # a module that this version does not have
        return None


def text_of(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def attributes_read(module: str) -> Iterator[str]:
    """X of `config.X`, `self.config.X`, `layer_config.X`, and of getattr and hasattr of these."""
    for node in ast.walk(tree_of(module) or ast.Module([], [])):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if last_name(node.value).endswith("config"):
                yield node.attr
        elif (
            isinstance(node, ast.Call)
            and last_name(node.func) in ("getattr", "hasattr")
            and last_name(node.args[0]).endswith("config")
        ):
            yield from filter(None, [text_of(node.args[1])])


def keys_taken(module: str, mappings: tuple[str, ...]) -> Iterator[str]:
    """X of kwargs.pop("X"), kwargs["X"], "X" in kwargs, and of getattr(self, "X"), where a class reads what it was given."""
    for node in ast.walk(tree_of(module) or ast.Module([], [])):
        found: ast.AST | None = None
        if isinstance(node, ast.Call) and node.args:
            if isinstance(node.func, ast.Attribute) and last_name(node.func.value) in mappings:
                found = node.args[0] if node.func.attr in ("get", "pop", "setdefault") else None
            elif last_name(node.func) in ("getattr", "hasattr") and last_name(node.args[0]) == "self":
                found = node.args[1]
        elif isinstance(node, ast.Subscript) and last_name(node.value) in mappings:
            found = node.slice
        elif isinstance(node, ast.Compare) and last_name(node.comparators[0]) in mappings:
            found = node.left
        if found is not None:
            yield from filter(None, [text_of(found)])


def read_by(model_type: str) -> set[str]:
    """Keys that reach the numbers of one family: its fields, and what its model and the shared parts read."""
    modules = [*SHARED, f"models.{CLASSES[model_type][0]}.modeling_{CLASSES[model_type][0]}"]
    return {*fields_of(model_type), *(name for module in modules for name in attributes_read(module))}


def every_key() -> set[str]:
    keys = set().union(*(read_by(model_type) for model_type in CLASSES))
    keys |= set(attributes_read("models.ministral.modeling_ministral"))
    for module in ("configuration_utils", "models.auto.configuration_auto", "modeling_rope_utils"):
        keys |= set(keys_taken(module, ("kwargs", "config_dict", "rope_parameters", "rope_parameters_dict")))
    for folder in FOLDERS:
        keys |= set(keys_taken(f"models.{folder}.configuration_{folder}", ("kwargs", "rope_parameters")))
    return keys


class Recorder(dict[str, Any]):
    """A config.json that knows which of its keys were asked for."""

    def __init__(self, raw: dict[str, Any]):
        super().__init__(raw)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_nothing_that_transformers_reads_is_undecided():
    undecided = every_key() - DECIDED
    assert not undecided, f"decide about {sorted(undecided)}: read, refuse, or list as without effect"


def test_the_walk_finds_what_it_must():
    """The walk would prove nothing if it overlooked how transformers reads; these are read in different ways."""
    found = every_key()
    assert {"sliding_window_pattern", "rope_local_base_freq", "layer_types", "is_causal", "torch_dtype"} <= found
    assert {"head_dim", "mscale", "truncate", "rope_scaling", "configuration_files", "attention_chunk_size"} <= found


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_family_reads_we_read(model_type):
    raw = Recorder(VALID[model_type] | {"use_sliding_window": True})
    config_from_dict(raw)
    wanted = read_by(model_type) & READ
    assert wanted <= raw.asked, f"never asked for: {sorted(wanted - raw.asked)}"


@pytest.mark.parametrize("model_type", CLASSES)
def test_keys_without_effect_have_none(model_type):
    want = config_from_dict(VALID[model_type])
    for value in ("junk", 7, {"a": 1}, None):
        assert config_from_dict(VALID[model_type] | dict.fromkeys(NO_EFFECT, value)) == want


@pytest.mark.parametrize("key", REFUSED_UNLESS)
@pytest.mark.parametrize("model_type", CLASSES)
def test_keys_that_we_do_not_obey_are_refused_by_name(model_type, key):
    allowed, _ = REFUSED_UNLESS[key]
    for value in allowed:
        config_from_dict(VALID[model_type] | {key: value})
    for value in ("x", 5, {"model_type": "llama"}, [1]):
        with pytest.raises(ConfigError, match=f"^config.json: '{key}' is "):
            config_from_dict(VALID[model_type] | {key: value})


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_keys_mean_the_defaults_of_transformers(model_type):
    ours = config_from_dict({"model_type": model_type})
    theirs = transformers.AutoConfig.for_model(model_type)
    for name, key in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
    }.items():
        assert getattr(ours, name) == getattr(theirs, key), key
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.activation == (getattr(theirs, "hidden_activation", None) or theirs.hidden_act)
    every = ["sliding_attention" if model_type == "mistral" else "full_attention"] * ours.num_layers
    types = getattr(theirs, "layer_types", every)
    assert ours.windows == tuple(theirs.sliding_window if name == "sliding_attention" else None for name in types)
    assert ours.attn_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert ours.attn_scale == getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5
    rope = theirs.rope_parameters
    parts = [rope["full_attention"], rope["sliding_attention"]] if "full_attention" in rope else [rope]
    assert [(r.kind, r.theta) for r in ours.ropes] == [(part["rope_type"], part["rope_theta"]) for part in parts]

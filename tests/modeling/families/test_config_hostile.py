"""Hostile config.json files: a ModelConfig or one line, at once, and nothing is built from numbers that the weights deny."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from make.config_draws import ANYTHING, VALID, hostile
from make.effort import many
from make.families import CASES
from make.places import ROOT
from modeling import fields
from modeling.checkpoint.expected import expected_shapes
from modeling.checkpoint.loading import load_outline, tensor_slots
from modeling.config import ModelConfig, read_json
from modeling.errors import CheckpointError, ConfigError, RestKVWarning
from modeling.families.registry import config_from_dict, read_config
from modeling.fields import shown
from modeling.rope import Rotary

LLAMA = VALID["llama"]
LAST = 2**31 - 1  # the last position that any config may name


def outcome(raw: dict[str, Any]) -> ModelConfig | None:
    """The config, or None where it was refused in one decent line; anything else fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestKVWarning)
            return config_from_dict(raw, "here/config.json")
    except ConfigError as error:
        text = str(error)
        assert text.startswith("here/config.json: ")
        assert text.isprintable()
        assert len(text) < 400
        return None


def assert_sane(config: ModelConfig) -> None:
    """Every number of the config is bounded, and its rotary tables are finite at every position."""
    assert len(config.windows) == len(config.layer_rope) == config.num_layers <= fields.MAX_LAYERS
    assert config.head_dim <= fields.MAX_HEAD_DIM
    for window in config.windows:
        assert window is None or 1 <= window <= LAST
    assert 0 < config.attn_scale < 1e4
    pos = torch.tensor([[0, 1, 100_000, LAST]])
    for rope in config.ropes:
        rotary = Rotary(rope)
        assert rotary.inv_F.isfinite().all()
        for part in rotary(pos, torch.tensor([LAST]), torch.float32):
            assert part.isfinite().all()


def fuzz(examples: int) -> None:
    fates: list[bool] = []

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(hostile())
    def attack(raw: dict[str, Any]) -> None:
        config = outcome(raw)
        fates.append(config is not None)
        if config is not None:
            assert_sane(config)

    attack()
    assert {True, False} == set(fates), "some must be taken and some refused, or nothing was tried"


def test_drawn_hostile_configs_are_read_or_refused_in_one_line():
    fuzz(150)


@pytest.mark.slow
def test_many_drawn_hostile_configs_are_read_or_refused_in_one_line():
    fuzz(many(20_000, 10))


@settings(max_examples=many(100, 2), deadline=None)
@given(ANYTHING)
def test_a_generation_config_of_any_content_is_read_or_refused_in_one_line(value):
    try:
        ids = fields.Fields({"eos_token_id": value}, "here").token_ids("eos_token_id", (2,))
    except ConfigError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
    else:
        assert all(0 <= i <= LAST for i in ids)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "layers 1e9": ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000; it must be a whole number of at"),
    "layers 1e5 and their types": (
        {"num_hidden_layers": 10**5, "layer_types": ["full_attention"] * 10**5},
        "'num_hidden_layers' is 100000",
    ),
    "head_dim 2e9": ({"head_dim": 2 * 10**9}, "'head_dim' is 2000000000"),
    "hidden_size 2**63": ({"hidden_size": 2**63}, "'hidden_size' is 9223372036854775808"),
    "a number of 401 digits": ({"intermediate_size": 10**400}, "'intermediate_size' is a number of 401 digits"),
    "a float beyond floats": ({"rms_norm_eps": 10**400}, "'rms_norm_eps' is a number of 401 digits"),
    "digits that Python cannot print": ({"rope_theta": 10**6000}, "'rope_theta' is a number of 6001 digits"),
    "vocab_size": ({"vocab_size": 10**9}, "'vocab_size' is 1000000000"),
    "positions": ({"max_position_embeddings": 2**31}, "'max_position_embeddings' is 2147483648"),
    "window": ({"model_type": "mistral", "architectures": None, "sliding_window": 2**31}, "'sliding_window' is"),
    "layer_types 5": ({"layer_types": 5}, "'layer_types' is 5; it must be a list"),
    "layer_types text": ({"layer_types": "full_attention"}, "'layer_types' is 'full_attention'; it must be a list"),
    "layer_types of lists": ({"layer_types": [[], [], []]}, "layer type [] is unknown"),
    "layer_types empty": ({"layer_types": []}, "'layer_types' has 0 entries for 3 layers"),
    "NaN": ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
    "Infinity": ({"rope_theta": float("inf")}, "'rope_theta' is inf; it must be a number from 1 to 1e+15"),
    "true for a number": ({"rope_theta": True}, "'rope_theta' is True"),
    "theta 0": ({"rope_theta": 0.0}, "'rope_theta' is 0.0; it must be a number above 0"),
    "yarn, theta 1": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, "yarn needs more"),
    "yarn, tiny beta": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 1e-320}},
        "'beta_slow' is 1e-320",
    ),
    "factor overflows": ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "'factor' is 1e-300"),
    "dynamic factor": (
        {"rope_scaling": {"type": "dynamic", "factor": 1e300}},
        "it must be a number from 0.001 to 1e+06",
    ),
    "an array of ends": ({"eos_token_id": [1] * 5000}, "'eos_token_id' lists 5000 token ids"),
    "an id of 71 bits": ({"eos_token_id": 2**70}, "it must be a token id or a list of them"),
    "odd head_dim": ({"head_dim": 15}, "head_dim 15 is odd"),
    "a megabyte": ({"hidden_act": "a" * 1_000_000}, "activation 'aaaa"),
    "line breaks": ({"dtype": "x\ny\x1b[2J"}, r"dtype 'x\ny\x1b[2J' is not supported"),
    "architectures": ({"architectures": ["\x1b" + "a" * 10**6]}, r"architecture '\x1baaaa"),
    "model_type": ({"model_type": "a\n" * 10**6}, r"model_type 'a\na\n"),
    "two rope types": (
        {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
        "leave one of them out",
    ),
    "su": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su' is unknown"),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 10**5}},
        "rope type 'longrope' is unknown",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_named_and_shortened(name):
    change, text = HOSTILE[name]
    with pytest.raises(ConfigError) as caught:
        config_from_dict(LLAMA | change)
    assert text in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"vocab_size": 1{"0" * 5000}}}', "a number of 5001 digits"),
        ("[1]", "holds a list, must be a JSON object"),
        ("5", "holds a int, must be a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_python_cannot_hold_is_one_line(name, content, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_of_two_equal_keys_holds_as_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA)[:-1] + ', "vocab_size": 77}')
    assert read_config(tmp_path).vocab_size == 77
    assert read_json(tmp_path / "config.json")["vocab_size"] == 77


def test_values_are_shown_in_one_short_line():
    for value in (
        "a" * 10**6,
        ["\n"] * 1000,
        {"a": {"b": {"c": {"d": [10**9000]}}}},
        10**9000,
        "\x1b]52;c;x\x07",
        b"\xff",
    ):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()
    assert shown("llama") == "'llama'"
    assert shown([1, "a", None]) == "[1, 'a', None]"


@pytest.mark.parametrize("name", CASES)
def test_expected_shapes_are_those_of_the_built_model(name, tiny):
    model = load_outline(tiny(name).folder)
    slots = {name: tuple(slot.shape) for name, slot in tensor_slots(model).items()}
    assert expected_shapes(model.config) == slots


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 9999},
        {"head_dim": 65_536},
        {"hidden_size": 2**31 - 1, "head_dim": 8},
        {"intermediate_size": 2**31 - 1},
        {"vocab_size": 60_000_000},
        {"num_attention_heads": 2**31 - 2, "num_key_value_heads": 1},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_sizes_that_the_weights_deny_are_refused_before_anything_is_built(change, tiny, tmp_path, monkeypatch):
    folder = tiny("llama2").folder
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    monkeypatch.setattr("modeling.checkpoint.loading.Decoder", None)
    with pytest.raises(CheckpointError, match="the weights do not fit config") as caught:
        load_outline(tmp_path)
    assert len(str(caught.value)) < 2000


HEAVY = """
import json, pathlib, resource, sys, time
import modeling.checkpoint.loading
from modeling.errors import RestKVError
folder, raw = pathlib.Path(sys.argv[1]), json.loads((pathlib.Path(sys.argv[1]) / "config.json").read_text())
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, many = peak(), 10**5
for change in (
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": many, "layer_types": ["full_attention"] * many},
    {"num_hidden_layers": 10_000}, {"head_dim": 2 * 10**9}, {"head_dim": 2**16}, {"vocab_size": 2**26},
    {"intermediate_size": 2**31 - 1}, {"rope_theta": 10**4000}, {"layer_types": [["x" * 1000] * 100] * 1000},
):
    (folder / "config.json").write_text(json.dumps(raw | change))
    start = time.process_time()
    try:
        modeling.checkpoint.loading.load_outline(folder)
        sys.exit(f"taken: {str(change)[:60]}")
    except RestKVError as error:
        assert len(str(error)) < 2000
    took = time.process_time() - start
    assert took < 2, (str(change)[:60], took)
assert peak() - before < 300, (before, peak())
"""


def test_a_hostile_config_costs_less_than_two_seconds_and_300_megabytes(tiny, tmp_path):
    source = tiny("llama2").folder
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

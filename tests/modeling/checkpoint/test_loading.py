"""Loading: whatever folder transformers writes, strictly, and one clear line for every broken one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling.checkpoint.loading
from make.families import prompt_ids
from make.places import ROOT
from modeling.checkpoint.loading import INDEX, SINGLE, load_model, load_outline, resolve, tensor_slots
from modeling.errors import CheckpointError, ConfigError, RestKVError
from modeling.families.registry import read_config
from modeling.layers import Decoder
from twins.dense import dense_logits

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a small checkpoint that a test may break."""
    return Path(shutil.copytree(tiny("llama_biases").folder, tmp_path / "checkpoint"))


def edit(folder: Path, change) -> None:
    """Rewrite model.safetensors after change(tensors)."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path) -> None:
    """Split model.safetensors into two files, tensors in no order, with an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    halves = names[::2], names[1::2]
    for file, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *texts: str, error: type[RestKVError] = CheckpointError, **options) -> None:
    with pytest.raises(error) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for text in texts:
        assert text in message


@pytest.mark.parametrize("fused", [True, False])
def test_every_tensor_arrives_in_its_place(folder, fused):
    stored = load_file(folder / SINGLE)
    model = load_model(folder, fused=fused)
    slots = tensor_slots(model)
    assert slots.keys() == stored.keys()
    assert all(torch.equal(slots[name], stored[name]) for name in stored)
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_an_outline_is_the_model_without_its_weights(folder):
    outline, model = load_outline(folder, dtype=torch.float16), load_model(folder, dtype=torch.float16)
    described = [(name, p.shape, p.dtype) for name, p in outline.named_parameters()]
    assert described == [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    assert all(p.is_meta for p in outline.parameters())
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="missing"):
        load_outline(folder)


def test_shards_in_any_order_give_the_same_model(folder, tmp_path):
    ids = prompt_ids(20)
    want = dense_logits(load_model(folder), ids)
    shard(folder)
    assert torch.equal(dense_logits(load_model(folder), ids), want)


def test_shards_written_by_transformers_load(tiny, tmp_path):
    checkpoint = tiny("qwen2_window")
    checkpoint.reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = prompt_ids(20)
    assert torch.equal(dense_logits(load_model(tmp_path), ids), dense_logits(load_model(checkpoint.folder), ids))


def test_shards_may_be_links_out_of_the_folder_as_in_the_hub_cache(folder, tmp_path):
    shard(folder)
    blob = tmp_path / "blob"
    (folder / SHARDS[0]).rename(blob)
    (folder / SHARDS[0]).symlink_to(blob)
    load_model(folder)


def test_large_tensors_are_read_in_pieces(folder, monkeypatch):
    want = load_model(folder).state_dict()
    monkeypatch.setattr(modeling.checkpoint.loading, "CHUNK_BYTES", 1000)
    got = load_model(folder).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "bfloat16"])
def test_weights_are_converted_to_the_dtype_asked_for(folder, dtype):
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    stored = load_file(folder / SINGLE)
    slots = tensor_slots(load_model(folder, dtype=dtype))
    assert all(torch.equal(slots[name], stored[name].to(wanted)) for name in stored)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "bfloat16"), (None, None)])
def test_auto_dtype_is_the_configs_or_else_the_stored_one(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    if key:
        config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    wanted = torch.bfloat16 if key else torch.float32
    assert load_model(folder).embed_tokens.weight.dtype == wanted


def test_harmless_extras_are_ignored(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("qwen2_window").folder, tmp_path / "tied"))

    def extras(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(folder, extras)
    assert load_model(folder).lm_head is None


def test_a_stored_head_that_differs_from_the_tied_embedding_is_refused(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("qwen2_window").folder, tmp_path / "tied"))
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(folder, "lm_head.weight differs from the embedding", "set tie_word_embeddings to false")
    edit(folder, lambda t: t.update({"lm_head.weight": torch.ones(3, 3)}))
    refused(folder, "unexpected: 1 (lm_head.weight)")


def test_all_misfits_come_in_one_message(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(72, 63)
        tensors["model.extra"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)

    edit(folder, change)
    refused(
        folder,
        "missing: 2 (",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "wrong shape: 1 (model.layers.0.mlp.up_proj.weight [72, 63] for [72, 64])",
        "unexpected: 2 (",
        "model.extra",
        "q_norm",
    )


def test_a_long_list_of_misfits_is_shortened(folder):
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name])
    with pytest.raises(CheckpointError, match=r"missing: 32 \(.* and 24 more\)") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 700


def test_integer_tensors_are_not_weights(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    refused(folder, "not floating point: 1 (model.norm.weight I8)")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_weights_names_tensors_with_nan_or_inf(folder, value):
    name = "model.layers.1.self_attn.v_proj.weight"

    def change(tensors):
        tensors[name][3, 5] = value

    edit(folder, change)
    load_model(folder)
    refused(folder, f"NaN or Inf as float32 in 1 ({name})", check_weights=True)


def test_check_weights_sees_what_the_conversion_overflows(folder):
    edit(folder, lambda t: t["model.norm.weight"].fill_(1e6))
    load_model(folder, check_weights=True)
    refused(folder, "NaN or Inf as float16 in 1 (model.norm.weight)", dtype=torch.float16, check_weights=True)


def test_a_tensor_in_two_shards_is_refused(folder):
    shard(folder)
    first, second = (load_file(folder / name) for name in SHARDS)
    name = next(iter(first))
    save_file(second | {name: first[name]}, folder / SHARDS[1])
    refused(folder, f"{name} is both in {SHARDS[0]} and in {SHARDS[1]}")


@pytest.mark.parametrize(
    "target", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "x.bin", 3]
)
def test_an_index_may_only_name_safetensors_files_of_its_folder(folder, target):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, f"names {target!r}; shards must be .safetensors files of the same folder")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / SHARDS[1]).unlink()
    refused(folder, f"{SHARDS[1]} is missing, though {INDEX} names it")


@pytest.mark.parametrize(("content", "text"), [("{", "not valid JSON"), ("{}", "has no 'weight_map'")])
def test_a_broken_index_is_named(folder, content, text):
    shard(folder)
    (folder / INDEX).write_text(content)
    refused(folder, INDEX, text)


@pytest.mark.parametrize("size", [0, 5, 100, 30_000])
def test_a_truncated_file_is_named(folder, size):
    whole = (folder / SINGLE).read_bytes()
    assert size < len(whole)
    (folder / SINGLE).write_bytes(whole[:size])
    refused(folder, SINGLE, "no complete safetensors file", "download it again")


def test_only_pickles_are_refused_and_told_how_to_convert(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    refused(folder, "pytorch_model.bin is a pickle", "save_pretrained(NEW_FOLDER)")


def test_folders_without_weights_are_named(folder):
    (folder / SINGLE).rename(folder / SHARDS[0])
    refused(folder, f"has neither {SINGLE} nor {INDEX}")
    (folder / SHARDS[0]).unlink()
    refused(folder, f"no {SINGLE} and no {INDEX}; download the weights")


def test_no_folder_no_config_and_no_such_dtype(folder, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "no config.json", error=ConfigError)
    with pytest.raises(ConfigError, match="dtype 'int4' is not supported; known are auto, float32"):
        load_model(folder, dtype="int4")


def test_resolve_takes_folders_as_they_are(folder, monkeypatch):
    assert resolve(folder) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/checkpoint") == folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("/no/such/folder", "no such folder; give a checkpoint folder or a hub name such as org/name"),
        ("./typo", "no such folder; give a checkpoint folder"),
        ("gpt2", "no such folder; give a checkpoint folder"),
        ("a/b/c", "no such folder; give a checkpoint folder"),
    ],
)
def test_resolve_refuses_what_is_neither_folder_nor_hub_name(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        resolve(name)


def test_resolve_names_a_file_given_for_its_folder(folder):
    with pytest.raises(CheckpointError, match="is a file; give the folder that holds it"):
        resolve(folder / SINGLE)


def test_resolve_says_how_to_get_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'org/name: no such folder; .*pip install "restkv\[hub\]"'):
        resolve("org/name")


def test_resolve_downloads_hub_names_without_pickles_and_second_copies(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def download(name, **patterns):
        asked.update(patterns, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("org/name-1.5_b") == tmp_path
    assert asked["name"] == "org/name-1.5_b"
    files = {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        INDEX,
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
    }
    filtered = hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    filtered = set(hub.utils.filter_repo_objects(filtered, ignore_patterns=asked["ignore_patterns"]))
    assert files - filtered == {"pytorch_model.bin", "consolidated.safetensors", "original/params.json"}


def test_resolve_reports_a_failed_download_in_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(name, **patterns):
        raise OSError("404 for url\nCheck the name")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"not downloaded \(404 for url Check the name\)"):
        resolve("org/name")


PEAK = """
    import sys, torch
    from modeling.checkpoint.loading import load_model

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    load_model(sys.argv[2])  # what a first load imports and allocates once
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak is measured from here
    model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(size, status("VmHWM") - before)
"""


@pytest.fixture
def large_folder(tiny, tmp_path):
    """make(dtype): a sharded checkpoint of more than 400 MB, removed after the test."""

    def make(dtype: torch.dtype) -> Path:
        config = json.loads((tiny("llama2").folder / "config.json").read_text())
        config |= {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
        config |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            slots = tensor_slots(Decoder(read_config(tmp_path)))
        weight_map: dict[str, str] = {}
        for part in range(3):
            file, names = f"model-{part}.safetensors", list(slots)[part::3]
            save_file({name: torch.zeros(slots[name].shape, dtype=dtype) for name in names}, tmp_path / file)
            weight_map |= dict.fromkeys(names, file)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    yield make
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure the peak")
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("bfloat16", "bfloat16"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_loading_is_at_most_a_fifth_above_the_models(stored, wanted, tiny, large_folder):
    """Measured in a fresh process as resident bytes, of which mapped file pages are a part."""
    folder = large_folder(getattr(torch, stored))
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) >= 400e6
    arguments = [sys.executable, "-c", textwrap.dedent(PEAK), str(folder), str(tiny("llama2").folder), wanted]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert size >= 400e6
    assert peak < 1.2 * size, f"peak is {peak / size:.3f} of the model's {size / 1e6:.0f} MB"

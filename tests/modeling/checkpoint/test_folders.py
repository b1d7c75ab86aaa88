"""Folders and files that are not what was wanted, named for what they are with what to do about it; sizes in bounds."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import restkv
from modeling.checkpoint.loading import INDEX, SINGLE, load_model, load_outline, resolve
from modeling.config import read_json
from modeling.errors import CheckpointError, ConfigError, RestKVError, RestKVWarning, TokenizerError
from modeling.files import MAX_VALUES, MB, SIZE_LIMITS, read_bytes, reason, size_limit
from modeling.text.tokenizer import Tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 4976698672\n"
STAND_INS = {
    "lfs": (LFS, "is a Git LFS pointer", "git lfs pull"),
    "hawser": (b"version https://hawser.github.com/spec/v1\n", "is a Git LFS pointer", "git lfs pull"),
    "xet": (b"# xet version 0\nfilesize = 10\n", "is a Git Xet pointer", "download the file itself"),
    "page": (b"<!DOCTYPE html>\n<html class=''>", "is a web page", "/resolve/"),
    "page without doctype": (b"<html><head>", "is a web page", "/resolve/"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of recall-mini that a test may break."""
    return Path(shutil.copytree(Path(restkv.__file__).parent / "assets" / "recall-mini", tmp_path / "checkpoint"))


def refusal(path: Path | str) -> str:
    """The one line in which loading ends, or else the first turn of a chat: a broken template may be met there only."""
    with warnings.catch_warnings(), pytest.raises(RestKVError) as caught:
        warnings.simplefilter("error")
        restkv.load(path).tokenizer.chat([{"role": "user", "content": "hello"}])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    assert message.count(str(path)) <= 2  # what is to be given instead may lie within
    return message


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", SINGLE]
)
def test_what_stands_for_a_file_is_named_as_such(kind, name, folder):
    content, what, mend = STAND_INS[kind]
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: {what}") and mend in message


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00002.safetensors"])
def test_pointers_among_shards_are_named(name, folder):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / SINGLE).rename(folder / shards[0])
    save_file({"x": torch.ones(1)}, folder / shards[1])
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    (folder / name).write_bytes(LFS)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: is a Git LFS pointer")


def test_a_pointer_in_place_of_a_chat_template_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(LFS)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: is a Git LFS pointer.*git lfs pull"):
        Tokenizer.from_folder(folder).chat([{"role": "user", "content": "hello"}])


# name of a file given -> words of the refusal
GIVEN_FILES = {
    "model.gguf": ("is a GGUF file", 'gguf_file="model.gguf"', "save_pretrained(NEW_FOLDER)"),
    "MODEL.GGUF": ("is a GGUF file", 'gguf_file="MODEL.GGUF"'),
    "model.zip": ("is an archive", "unpack it"),
    "model.tar.gz": ("is an archive", "unpack it"),
    "pytorch_model.bin": ("is a pickle", "convert it where you trust it"),
    "consolidated.00.pth": ("is a pickle",),
    SINGLE: ("is a file; give the folder that holds it, ",),
    "config.json": ("is a file; give the folder that holds it, ",),
    INDEX: ("is a file; give the folder that holds it, ",),
}


@pytest.mark.parametrize("name", GIVEN_FILES)
def test_a_file_given_for_a_folder_is_told_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path / name)
    assert all(word in message for word in GIVEN_FILES[name]), message


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "is a link that leads nowhere" in refusal(tmp_path / "link")


# names of files in a folder without config.json -> words of the refusal
OTHER_KINDS = {
    "gguf": (["a-q4.gguf", "README.md"], ("no config.json", "a-q4.gguf is a GGUF file", 'gguf_file="a-q4.gguf"')),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], ("only an adapter", "merge_and_unload")),
    "old adapter": (["adapter_config.json", "adapter_model.bin"], ("only an adapter", "merge_and_unload")),
    "diffusers": (["model_index.json"], ("diffusers pipeline", "causal language models")),
    "original": (["params.json", "consolidated.00.pth", "tokenizer.model"], ("params.json", "Hugging Face's layout")),
    "new original": (["params.json", "consolidated.safetensors", "tekken.json"], ("params.json", "Hugging Face's")),
    "keras": (["tf_model.h5"], ("tf_model.h5", "another framework")),
    "jax": (["flax_model.msgpack"], ("another framework",)),
    "onnx": (["model.onnx"], ("another framework",)),
    "archive": (["model.zip"], ("is an archive", "unpack it")),
    "nested": (["run/config.json"], ("run inside has one", "give ")),
    "checkpoints": (["checkpoint-10/config.json", "checkpoint-5/config.json"], ("checkpoint-10, checkpoint-5",)),
    "nothing": ([], ("no config.json; give the folder of a Hugging Face checkpoint",)),
    "another thing": (["notes.txt"], ("no config.json; give the folder of a Hugging Face checkpoint",)),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_folder_of_another_kind_is_named(kind, tmp_path):
    names, words = OTHER_KINDS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert "only an adapter for org/base; merge it: peft.AutoPeftModelForCausalLM" in refusal(tmp_path)


# names of files beside config.json, without model.safetensors -> words of the refusal
OTHER_WEIGHTS = {
    "gguf": (["a.gguf"], ("a.gguf is a GGUF file",)),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], ("only an adapter", "merge_and_unload")),
    "pickle": (["pytorch_model.bin"], ("is a pickle", "save_pretrained(NEW_FOLDER)")),
    "shards": (["model-00001-of-00002.safetensors"], (f"neither {SINGLE} nor {INDEX}", "download the index")),
    "original": (["consolidated.safetensors"], ("consolidated.safetensors", "layout", "download")),
    "keras": (["tf_model.h5"], ("another framework",)),
    "zip": (["weights.zip"], ("is an archive",)),
    "nothing": ([], ("download the weights",)),
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_weights_of_another_kind_are_named(kind, folder):
    names, words = OTHER_WEIGHTS[kind]
    (folder / SINGLE).unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")
    message = refusal(folder)
    assert message.startswith(f"{folder}: ") and all(word in message for word in words), message


def test_an_adapter_beside_full_weights_is_remarked(folder):
    (folder / "adapter_config.json").write_text("{}")
    for load in (load_model, load_outline):
        with pytest.warns(
            RestKVWarning, match=r"adapter \(adapter_config.json\) .* is not applied; .*merge_and_unload"
        ):
            load(folder)


# -- folders of the hub's cache


@pytest.fixture
def cached(tmp_path, folder) -> Path:
    """models--org--name with one snapshot, whose files are links to blobs."""
    place = tmp_path / "hub" / "models--org--name"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(place / "blobs" / str(number))
        (snapshot / file.name).symlink_to(place / "blobs" / str(number))
    return place


def test_a_cache_folder_stands_for_its_only_snapshot(cached, monkeypatch):
    snapshot = cached / "snapshots" / ("a" * 40)
    for place in (cached, cached / "snapshots", cached / "blobs", cached / "refs"):
        assert resolve(place) == snapshot
        assert resolve(f"{place}/") == snapshot
    monkeypatch.chdir(cached)
    assert resolve(".") == snapshot
    assert resolve(snapshot) == snapshot
    load_outline(resolve(cached))


def test_a_cache_folder_with_several_snapshots_asks_for_one(cached):
    for letter in "bc":
        (cached / "snapshots" / (40 * letter)).mkdir()
    assert resolve(cached)  # unfinished downloads do not count
    (cached / "snapshots" / (40 * "b") / "config.json").write_text("{}")
    message = refusal(cached)
    assert f"2 snapshots; give one, such as {cached / 'snapshots' / (40 * 'a')}" in message and "org/name" in message


def test_a_cache_folder_without_a_snapshot_says_what_to_download(cached):
    shutil.rmtree(cached / "snapshots")
    assert "without a complete snapshot; give the hub name org/name to download it" in refusal(cached)


def test_the_whole_cache_says_what_is_in_it(cached):
    assert "give a name such as org/name, or one of its folders: models--org--name" in refusal(cached.parent)


# -- sizes


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json", INDEX],
)
def test_a_file_of_a_gigabyte_is_refused_before_it_is_read(name, folder):
    if name == INDEX:
        (folder / SINGLE).unlink()
    (folder / name).touch()
    os.truncate(folder / name, 1 << 30)
    tracemalloc.start()
    start = time.monotonic()
    message = refusal(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name}: has 1,024 MB, at most {size_limit(Path(name)) // MB} are read" in message
    assert peak < 100e6 and time.monotonic() - start < 2


def test_a_file_without_a_size_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="has 4 MB, at most 4 are read"):
        read_bytes(tmp_path / "config.json", ConfigError)


def test_short_json_that_would_fill_the_memory_is_refused(tmp_path):
    file = tmp_path / INDEX
    file.write_text('{"weight_map": [' + "[]," * MAX_VALUES + "[]]}")
    assert file.stat().st_size < SIZE_LIMITS[INDEX]
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="holds over 2,500,000 values"):
        read_json(file, CheckpointError)
    assert time.monotonic() - start < 1


def index_of(count: int, file: str) -> str:
    return '{"weight_map": {' + ", ".join(f'"tensor.{i}": "{file}"' % {"i": i} for i in range(count)) + "}}"


def test_an_index_of_a_million_entries_is_no_matter(folder):
    (folder / SINGLE).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(index_of(10**6, "a.safetensors"))
    start = time.process_time()
    load_outline(folder)
    assert time.process_time() - start < 8  # 1 where nothing else runs; it was 23


def test_an_index_of_many_files_ends_at_the_first_that_is_missing(folder):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(index_of(200_000, "%(i)d.safetensors"))
    start = time.process_time()
    assert ": 0.safetensors is missing" in refusal(folder)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "weight_map", [None, [], [["a", "b"]], "a", 7, True, {}, {"a": None}, {"a": []}, {"a": {"b": "c"}}, {"a": 10**400}]
)
def test_a_weight_map_of_another_type_is_one_line(weight_map, folder):
    (folder / SINGLE).unlink()
    text = json.dumps({"weight_map": weight_map})
    (folder / INDEX).write_text(text)
    message = refusal(folder)
    assert INDEX in message and len(message) < 400


@pytest.mark.parametrize("target", ["a\0.safetensors", "..", "", "a/", "x" * 5000 + "/", "/", "sub\\a.safetensors"])
def test_names_of_shards_that_are_none(target, folder):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": target}}))
    assert "shards must be .safetensors files of the same folder" in refusal(folder)


def test_a_reason_never_names_the_path_again(tmp_path):
    for act in (lambda: (tmp_path / "none").read_text(), lambda: tmp_path.read_text()):
        with pytest.raises(OSError) as caught:
            act()
        assert str(tmp_path) in str(caught.value)
        assert reason(caught.value) == caught.value.strerror


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_no_message_names_a_path_twice(name, folder, monkeypatch):
    """A file that is there and cannot be opened; the user of the tests may open anything, so the opening is made to fail."""
    opened = Path.open

    def fail(self, *args, **options):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    (folder / "generation_config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", fail)
    message = refusal(folder)
    assert message == f"{folder / name}: cannot be read (Permission denied)"

"""What the command line cannot use is said in one line on stderr, with exit code 2 and nothing on stdout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from make.commands import STORY, Ran
from restkv.cli.options import RECALL

# -- bad input: one line on stderr, exit code 2, nothing on stdout


def refused(ran: Ran, *words: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    (line,) = ran.lines()
    assert line.startswith("restkv: error: ")
    for word in words:
        assert word in line


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def half_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_words(folder: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda weights: weights.update({name: weights[name][:300].clone() for name in names}))
    configure(folder, vocab_size=300)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("model", "no such folder")),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("no config.json",)),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json", "not valid JSON"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no model.safetensors",)),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "half a safetensors file": (half_file, ("model.safetensors", "no complete safetensors file")),
    "index outside the folder": (index_outside, ("'../model.safetensors'", "same folder")),
    "missing tensor": (lambda folder: rewrite(folder, lambda weights: weights.pop(NORM)), ("missing", NORM)),
    "wrong shape": (
        lambda folder: rewrite(folder, lambda weights: weights.update({UP: weights[UP][:-1].clone()})),
        ("wrong shape", UP),
    ),
    "NaN weights": (lambda folder: rewrite(folder, lambda weights: weights[UP][3].fill_(float("nan"))), ("NaN", UP)),
    "unknown family": (
        lambda folder: configure(folder, model_type="parrot", architectures=["ParrotForCausalLM"]),
        ("'parrot'", "not a known family"),
    ),
    "token id beyond the vocabulary": (fewer_words, ("token id", "vocabulary of 300")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(run: Callable[..., Ran], copy: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    refused(run("generate", copy, "-p", STORY, "-n", 2, "--check-weights"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", ""), ("prompt is empty",)),
        ((), ("prompt is empty",)),  # stdin holds nothing
        (("-p", "a", "--prompt-file", "b"), ("two prompts",)),
        (("--prompt-file", "no/such/file"), ("no/such/file", "cannot be read")),
        (("-p", STORY, "--budget", "0"), ("budget 0",)),
        (("-p", STORY, "--budget", "35", "--sinks", "4"), ("budget 35", "36")),
        (("-p", STORY, "--budget", "1.5"), ("budget 1.5",)),
        (("-p", STORY, "--budget", "many"), ("'--budget'", "'many'")),
        (("-p", STORY, "--budget", "40", "--protect", "0:20"), ("budget 40", "protected")),
        (("-p", STORY, "--protect", "4"), ("'4'", "START:END")),
        (("-p", STORY, "--protect", f"0:{10**30}"), (str(10**30), "give numbers below 2147483648")),
        (("-p", STORY, "--protect", "9:4"), ("(9, 4)", "start < end")),
        (("-p", STORY, "--budget", f"64,{10**30}"), (str(10**30), "give numbers below 2147483648")),
        (("-p", STORY, "--set", "kernel_size"), ("'kernel_size'", "NAME=VALUE")),
        (("-p", STORY, "--set", "kernel=5"), ("'kernel'", "kernel_size")),
        (("-p", STORY, "--interval", "often"), ("interval", "'often'")),
        (("-p", STORY, "--method", "magic"), ("'magic'", "snapkv")),
        (("-p", STORY, "--method", "full", "--budget", "9"), ("full", "budget")),
        (("-p", STORY, "--preset", "magic"), ("'magic'", "paper-ruler")),
        (("-p", STORY, "--method", "snapkv", "--alpha", "0.5"), ("snapkv", "'alpha'")),
        (("-p", STORY, "--temperature", "-1"), ("temperature",)),
        (("-p", STORY, "-n", "0"), ("max_new_tokens",)),
        (("-p", STORY, "--dtype", "int4"), ("'int4'", "bfloat16")),
        (("-p", STORY, "--device", "abacus"), ("'abacus'", "cpu")),
        (("-p", STORY, "--device", "cuda:99"), ("'cuda:99'",)),
        (("-p", STORY, "--backend", "magic"), ("'magic'", "flex")),
        (("-p", STORY, "--chat"), ("no chat template; drop --chat",)),
        (("-p", STORY, "--budget", "64", "--set", "budget=40"), ("--budget and --set budget", "given twice")),
        (("-p", STORY, "--budget-by", "adakv", "--set", "budget_by=uniform"), ("--budget-by and --set budget_by",)),
        (("-p", STORY, "-o", "no/such/folder/answer"), ("no/such/folder/answer", "cannot be written")),
        (("-p", STORY, "--budgit", "9"), ("--budgit",)),
    ],
)
def test_bad_options_are_refused(run: Callable[..., Ran], arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("generate", RECALL, *arguments), *words)


def test_prompt_file_must_be_text(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    refused(run("generate", "--prompt-file", tmp_path / "picture"), "picture", "not UTF-8", "byte 0")


def test_inspect_refuses_too(run: Callable[..., Ran], tmp_path: Path) -> None:
    refused(run("inspect", tmp_path / "none"), "none", "no such folder")
    refused(run("inspect", RECALL, "--budget", 0), "budget 0")
    refused(run("inspect", RECALL, "--budget", "64,64"), "budget (64, 64)", "4 layers")
    refused(run("methods", "--bytes", RECALL, "--budget", "64,64"), "budget (64, 64)", "4 layers")

"""A checkpoint that has learned nothing and never stops talking: for tests of what surrounds a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.recall_mini.lessons import make_tokenizer
from modeling.checkpoint.loading import tensor_slots
from modeling.families.registry import read_config
from modeling.layers import Decoder
from restkv.cli.options import RECALL


def save_rambler(folder: Path) -> None:
    """Random weights with recall-mini's tokenizer. It says words only: no line break, no end, no half of a character."""
    config = json.loads((RECALL / "config.json").read_text()) | {
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text((RECALL / "tokenizer_config.json").read_text())
    tokenizer = make_tokenizer(config["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = Decoder(read_config(folder)).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=random)
    words = [bool(re.fullmatch(r" [A-Za-z]+", tokenizer.decode([token]))) for token in range(config["vocab_size"])]
    assert model.lm_head is not None
    model.lm_head.weight[~torch.tensor(words)] = 0  # the likeliest of some thousand words is above zero
    weights = {name: slot.clone().contiguous() for name, slot in tensor_slots(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_rambler(folder: Path, arguments: tuple[object, ...]) -> list[str]:
    """A command line that names its model: this one, unless it has named another."""
    words = [str(argument) for argument in arguments]
    if words[:1] in (["generate"], ["chat"]) and (len(words) == 1 or words[1].startswith("-")):
        words.insert(1, str(folder))
    return words

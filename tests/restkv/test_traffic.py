"""What ranks would send and hold, for models that are not here; test_parallel.py counts what really crosses."""

from __future__ import annotations

import re

import pytest
import torch

from make.places import ROOT
from modeling.config import ModelConfig
from modeling.families.registry import config_from_dict
from restkv import traffic
from restkv.errors import ParallelError
from restkv.policies import ReSTKV
from restkv.traffic import Link, Traffic

LENGTH = 32768
MODELS = {
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3.1-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def config_of(name: str) -> ModelConfig:
    shape = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    return config_from_dict(shape | MODELS[name], name)


def tables() -> str:
    """The tables of docs/parallel.md."""
    parts = []
    for name in MODELS:
        rows = [traffic.HEADS, tuple("---" for _ in traffic.HEADS)]
        config, policy = config_of(name), ReSTKV(budget=1024)
        rows += [tuple(traffic.cells(config, torch.bfloat16, policy, LENGTH, ranks)) for ranks in (2, 4, 8)]
        parts.append(f"**{name}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def test_the_tables_of_the_document_are_these() -> None:
    assert tables() in (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8"), tables()


def test_a_token_by_hand() -> None:
    token = traffic.of_tokens(config_of("Llama-3.1-8B"), torch.bfloat16)
    assert token == Traffic(sums=65, summed=65 * 4096 * 2, gathers=1, gathered=128256 * 2)
    assert token.calls == 66
    assert token.sent(2) == 65 * 8192 + 128256  # of two ranks each sends the other half of a sum twice
    link = Link("a kilobyte a second", 1000.0, 2.0)
    assert token.seconds(2, link) == pytest.approx(66 * 2.0 + (65 * 8192 + 128256) / 1000)
    assert token.seconds(1, link) == 0


def test_memory_by_hand() -> None:
    config = config_of("Llama-3.1-8B")
    whole = traffic.held(config, torch.bfloat16, 1, 1000)
    assert whole.weights == 2 * 8_030_261_248  # the parameters of Llama-3.1-8B
    assert whole.cache == 1000 * 131072
    norms = (2 * 32 + 1) * 4096
    for ranks in (2, 4, 8):
        part = traffic.held(config, torch.bfloat16, ranks, 1000)
        assert part.weights == 2 * ((8_030_261_248 - norms) // ranks + norms)
        assert part.cache * ranks == whole.cache


def test_a_model_that_no_ranks_can_share_is_refused() -> None:
    shape = {"model_type": "llama", "num_key_value_heads": 1, "num_attention_heads": 4}
    with pytest.raises(ParallelError, match=re.escape("1 KV heads do not divide among 2 ranks; start 1 of them")):
        traffic.sizes(config_from_dict(shape, "one head"))
    assert traffic.sizes(config_of("Llama-3.1-70B")) == [2, 4, 8]


def test_inspect_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    from restkv.cli import main

    assert main(["inspect", "--ranks", "--budget", "64"]) == 0
    out = capsys.readouterr().out
    assert "ranks under restkv, a prompt of 8,192 tokens" in out and "10 calls" in out
    assert main(["inspect", "--ranks", "--budget", "0.5"]) == 2
    assert "budget 50% is no number of entries" in capsys.readouterr().err

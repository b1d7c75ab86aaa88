"""The speed bench: workers answer, the floor counts what is there, the result is whole."""

from __future__ import annotations

import json

import pytest
import torch

from bench.speed import PRESETS, main, weight_bytes
from bench.workers import Process
from modeling.families import config_from_dict
from modeling.layers import Decoder


@pytest.mark.parametrize("preset", PRESETS)
def test_the_floor_counts_every_weight_a_step_reads(preset):
    config = config_from_dict(PRESETS[preset])
    with torch.device("meta"):
        model = Decoder(config)
    embedding = 0 if config.tie_embeddings else model.embed_tokens.weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - embedding
    assert weight_bytes(PRESETS[preset], "bfloat16") == 2 * matrices


def test_presets_have_the_published_numbers_of_parameters():
    published = {
        "tinyllama-1.1b": 1.10,
        "llama-3.1-8b": 8.03,
        "mistral-7b": 7.25,
        "gemma-2-2b": 2.61,
        "qwen2.5-7b": 7.62,
    }
    for preset, billions in published.items():
        with torch.device("meta"):
            model = Decoder(config_from_dict(PRESETS[preset]))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_small_comparison_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "speed.json"
    main(
        "--preset tiny --dtype float32 --contexts 200 --methods restkv,full --budget 64 --backend sdpa "
        f"--threads 1 --rounds 2 --tokens 3 --out {out}".split()
    )
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result
    rows = {row["contestant"]: row for row in result["rows"]}
    assert set(rows) == {"restkv restkv", "restkv full", "transformers full"}
    assert rows["restkv restkv"]["kept"] == 64 + 9 and rows["restkv full"]["kept"] == 200 + 9
    assert rows["transformers full"]["kept"] == 200 + 9
    assert rows["transformers full"]["cache_bytes"] == 2 * 2 * 2 * 16 * 4 * 209  # k and v, layers, KV heads, D, float32
    for row in rows.values():
        assert row["tpot_ms"] > 0 and row["ttft_s"] > 0 and row["floor_ms"] > 0 and row["first_round_s"] > 0
    assert result["machine"]["torch"] == torch.__version__ and result["read_rate"] > 1e8


def test_a_worker_that_dies_is_named():
    process = Process("broken", "bench.ours", [json.dumps({"config": {}})])
    with pytest.raises(RuntimeError, match="worker broken died"):
        process.ask("prefill", context=8)
    process.close()

"""The speed bench: workers answer, the floor counts what is there, results are whole."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.speed import contest as speed
from bench.speed.contest import PRESETS, Contest
from bench.speed.floor import Machine, decode_floor, matrix_parameters, prefill_floor
from bench.speed.ours import Ours
from bench.speed.workers import Process, WorkerDied
from modeling.families.registry import config_from_dict
from modeling.layers import Decoder
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PromptError
from restkv.evict import Evictor

CONTEST = Contest(
    preset="tiny",
    model=None,
    dtype="float32",
    device="cpu",
    contexts=(200,),
    batches=(1,),
    methods=("restkv", "full"),
    budget=64,
    peers=("transformers",),
    backend="sdpa",
    threads=1,
    rounds=2,
    tokens=3,
    peer_python=None,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_floor_counts_every_weight_a_step_reads(preset: str) -> None:
    config = config_from_dict(PRESETS[preset])
    with torch.device("meta"):
        model = Decoder(config)
    embedding = 0 if config.tie_embeddings else model.embed_tokens.weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - embedding
    assert sum(matrix_parameters(config)) == matrices


def test_the_floor_is_what_reading_or_multiplying_takes() -> None:
    config = config_from_dict(PRESETS["tiny"])
    layers, head = matrix_parameters(config)
    reads = Machine(1e9, 1e15)
    assert decode_floor(config, "float32", reads, 1000, 8, 1) == pytest.approx((4 * (layers + head) + 1000) / 1e9)
    multiplies = Machine(1e15, 1e9)
    attended = 2 * 2 * 8 * config.num_layers * config.num_heads * config.head_dim  # q.k and a.v of 8 entries
    assert decode_floor(config, "float32", multiplies, 1000, 8, 3) == pytest.approx(
        3 * (2 * (layers + head) + attended) / 1e9
    )
    pairs = sum(2 * 2 * (token + 0.5) for token in range(100)) * config.num_layers * config.num_heads * config.head_dim
    assert prefill_floor(config, multiplies, 100, 2) == pytest.approx(2 * (2 * (100 * layers + head) + pairs) / 1e9)


def test_presets_have_the_published_numbers_of_parameters() -> None:
    published = {
        "smollm2-135m": 0.135,
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


@pytest.mark.slow
def test_a_small_comparison_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    command = (
        "bench speed --preset tiny --dtype float32 --contexts 90,200 --batches 1,2 --methods restkv,full --budget 64"
    )
    command += " --peers transformers --backend sdpa --threads 1 --rounds 2 --tokens 3 --prompts 3 --out"
    assert main([*command.split(), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "TPOT" in printed and "restkv restkv" in printed and out.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(out.read_text())
    rows = {(row["contestant"], row["context"], row["batch"]): row for row in result["rows"]}
    assert len(rows) == 3 * 2 * 2
    for context in (90, 200):
        for batch in (1, 2):
            fed = context + 9
            assert rows["restkv restkv", context, batch]["kept"] == 64 + 9
            assert rows["restkv full", context, batch]["kept"] == fed
            full = rows["transformers", context, batch]
            assert full["kept"] == fed
            assert full["cache_bytes"] == batch * 2 * 2 * 2 * 16 * 4 * fed  # k and v, layers, KV heads, D, float32
    for row in rows.values():
        low, high = row["tpot_quartiles_ms"]
        assert 0 < low <= row["tpot_ms"] <= high and row["tokens_per_s"] == pytest.approx(
            1e3 * row["batch"] / row["tpot_ms"]
        )
        assert len(row["ttfts_s"]) == 3 and row["ttft_s"] == sorted(row["ttfts_s"])[1]
        assert row["ttft_s"] > 0 and row["floor_ms"] > 0 and row["ttft_floor_s"] > 0 and row["first_round_s"] > 0
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["tpot_ms"])
        assert row["new_graphs"] == 0
        evicts = row["contestant"] == "restkv restkv"
        assert row["tpot_with_evictions_ms"] > 0 if evicts else row["tpot_with_evictions_ms"] is None
    for (name, _, _), row in rows.items():
        assert (row["evicting_s"] is None) == (name == "transformers")
        assert name == "transformers" or 0 < row["evicting_s"] < max(row["ttfts_s"])
    assert torch.__version__.startswith(result["versions"]["torch"].partition("+")[0])
    assert result["rates"]["read_bytes_per_s"] > 1e8 and result["rates"]["operations_per_s"] > 1e8


@pytest.mark.slow
def test_filled_caches_are_as_large_as_those_of_prompts(tmp_path: Path) -> None:
    """As in the test above, without running prompts."""
    out = tmp_path / "speed.json"
    command = "bench speed --preset tiny --dtype float32 --contexts 200 --batches 2 --methods restkv,h2o,full --filled"
    command += " --budget 64 --start-up --peers transformers --backend sdpa --threads 1 --rounds 2 --tokens 3 --out"
    assert main([*command.split(), str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["contestant"]: row for row in result["rows"]}
    assert [rows[f"restkv {name}"]["kept"] for name in ("restkv", "h2o", "full")] == [64 + 9, 64, 209]
    full = rows["transformers"]
    assert full["kept"] == 209 and full["cache_bytes"] == 2 * 2 * 2 * 2 * 16 * 4 * 209
    assert all(row["ttft_s"] is None and row["tpot_ms"] > 0 for row in rows.values())
    assert [start["contestant"] for start in result["start_up"]] == ["restkv restkv", "restkv h2o", "restkv full"]
    assert all(start["cold_s"] > 0 and start["warm_s"] > 0 for start in result["start_up"])


@pytest.mark.slow
def test_every_method_reads_its_prompts_in_every_way_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = "bench speed --preset tiny --dtype float32 --contexts 300 --methods restkv,full --budget 64 --peers none"
    command += (
        " --prefill dense,chunked,a-shape:block=64:sinks=64:local=64 --backend sdpa --threads 1 --rounds 1 --tokens 2"
    )
    assert main([*command.split(), "--out", str(out)]) == 0
    rows = {row["contestant"]: row for row in json.loads(out.read_text())["rows"]}
    ways = ("", ", chunked", ", a-shape:block=64:sinks=64:local=64")
    assert list(rows) == [f"restkv {method}{way}" for method in ("restkv", "full") for way in ways]
    assert [rows[f"restkv restkv{way}"]["kept"] for way in ways] == [64 + 4] * 3
    assert [rows[f"restkv full{way}"]["kept"] for way in ways] == [304] * 3


@pytest.mark.slow  # transformers compiles its decode step
def test_a_static_cache_is_decoded_from_compiled(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = "bench speed --preset tiny --dtype float32 --contexts 100 --methods full --peers transformers-static"
    assert main([*command.split(), "--backend", "sdpa", "--threads", "1", "--rounds", "1", "--out", str(out)]) == 0
    _, static = json.loads(out.read_text())["rows"]
    assert static["kept"] == 100 + 32 and static["graphs"] >= 1 and static["new_graphs"] == 0


def test_memory_is_counted_above_the_loaded_model(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = f"bench memory {RECALL} --dtype float32 --contexts 8000 --methods restkv,full --budget 64 --peers none"
    assert main([*command.split(), "--backend", "sdpa", "--threads", "1", "--tokens", "4", "--out", str(out)]) == 0
    ours, full = json.loads(out.read_text())["rows"]
    assert (ours["contestant"], full["contestant"]) == ("restkv restkv", "restkv full")
    entries = 4 * 2 * 2 * 32 * 4  # bytes of a token: layers, KV heads, k and v, D, float32
    assert full["cache_bytes"] > 8000 * entries > 20 * ours["cache_bytes"]
    for row in (ours, full):
        assert row["prefill_peak_bytes"] > 8000 * 128 * 4  # a hidden state per token at least
    assert full["after_prefill_bytes"] - ours["after_prefill_bytes"] > 0.5 * 8000 * entries


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--preset nobody", "preset 'nobody' is unknown; choose from llama-124m"),
        ("--peers somebody", "peer 'somebody' is unknown"),
        ("--contexts 1k", "--contexts '1k': give whole numbers"),
        ("--contexts 0", "--contexts '0': give whole numbers of at least 1"),
        ("--suite cpu", "--suite 'cpu' is unknown; choose from gpu"),
        ("--methods nothing", "method 'nothing' is unknown"),
        ("--filled --peers transformers-static", "peer 'transformers-static' cannot be filled"),
        ("--filled --prefill a-shape", "prefill 'a-shape': a cache that is filled reads no prompt"),
        ("--prefill sparse", "prefill 'sparse' is not known"),
        ("--prompts 0", "prompts 0: give whole numbers of at least 1"),
        (f"{RECALL} --preset tiny", "give a preset or a checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed", *command.split()]) != 0
    assert message in capsys.readouterr().err


def test_peers_with_nothing_to_compress_stay_away() -> None:
    contest = replace(CONTEST, peers=("transformers", "kvpress-snapkv"))
    assert [*contest.contestants] == ["restkv restkv", "restkv full", "transformers", "kvpress-snapkv"]
    assert [contest.takes_part("kvpress-snapkv", context) for context in (64, 65)] == [False, True]
    assert contest.takes_part("transformers", 64) and contest.takes_part("restkv restkv", 64)
    with pytest.raises(PromptError, match="rounds 0"):
        replace(CONTEST, rounds=0)


@pytest.mark.parametrize("idle", [False, True], ids=["when asked", "before"])
def test_a_worker_that_dies_is_named(idle: bool) -> None:
    process = Process("broken", "bench.speed.ours", [json.dumps({"config": {}})])
    if idle:
        process._process.wait()
    with pytest.raises(WorkerDied, match="worker broken died"):
        process.ask("prefill", context=8, batch=1)
    process.close()


def test_caches_that_would_not_fit_beside_all_others_are_left_out() -> None:
    """Three processes hold llama-3.1-8b's 16 GB each; 128 kB a token, in two caches that keep everything."""
    contest = replace(CONTEST, preset="llama-3.1-8b", dtype="bfloat16", budget=1024)
    for memory, context, batch, fits in (
        (140 << 30, 32_768, 8, True),
        (140 << 30, 131_072, 1, True),
        (140 << 30, 131_072, 8, False),
        (80 << 30, 32_768, 8, False),
        (None, 131_072, 8, True),
    ):
        assert (
            contest.fits("transformers", context, batch, memory)
            == fits
            == contest.fits("restkv full", context, batch, memory)
        )
        assert contest.fits("restkv restkv", context, batch, memory)


def test_what_has_been_measured_is_kept_when_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    measured = speed._round_robin

    def broken(*arguments):
        if 150 in arguments:
            raise WorkerDied("the worker has died")
        return measured(*arguments)

    monkeypatch.setattr(speed, "_round_robin", broken)
    command = "bench speed --preset tiny --dtype float32 --contexts 90,150 --methods restkv --budget 64 --peers none"
    code = main(
        [
            *command.split(),
            "--backend",
            "sdpa",
            "--threads",
            "1",
            "--rounds",
            "1",
            "--tokens",
            "1",
            "--out",
            str(out),
        ]
    )
    assert code == 2 and "the worker has died; what was measured" in capsys.readouterr().err
    assert [row["context"] for row in json.loads(out.read_text())["rows"]] == [90]


def test_every_way_of_ours_is_started_for_its_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Idle:
        def ask(self, op, **values):
            return {}

        def close(self):
            pass

    def start(self, name, environment):
        started.append((name, self.contestants[name][1]["prefill"]))
        return Idle()

    monkeypatch.setattr(Contest, "start", start)
    speed._start_ups(replace(CONTEST, prefills=("dense", "chunked")), lambda line: None)
    names = [f"restkv {method}{way}" for method in ("restkv", "full") for way in ("", ", chunked")]
    assert started == [(name, "chunked" if "chunked" in name else "dense") for name in names for _ in range(2)]


def test_evictions_between_chunks_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    contest, took = replace(CONTEST, prefills=("chunked",)), 0.05

    def slow(*arguments, **named):
        time.sleep(took)
        return evict(*arguments, **named)

    evict = Evictor.round
    monkeypatch.setattr(Evictor, "round", slow)
    worker = Ours(contest.contestants["restkv restkv, chunked"][1])
    worker.prefill(1200, 1)  # 512 tokens, 512 and 176
    assert worker.describe()["evicting_s"] > 2 * took
    worker.drop()
    assert worker.describe() == {}

"""The bench of compiling: its operations do what they are called, its figures what was measured, it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.report.page import as_json, build
from bench.report.quote import quoted
from bench.runs.folder import RunError, read_manifest, read_rows
from bench.speed import compiling, workers
from bench.speed.compiling import CompilePlan
from bench.speed.contest import Contest
from bench.speed.operations import OPERATIONS, Operations, operations_of
from bench.speed.payoff import shown, tokens_until
from bench.speed.workers import WorkerDied, answer
from restkv.cli import main
from restkv.policies import H2O, FullCache, ReSTKV


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at what memory is in use, which takes longer in a process of tests than all else."""
    monkeypatch.setattr(workers, "_in_use", lambda cuda, reset=True: 0)


PATTERN = "a-shape:block=64:sinks=64:local=64"
METHODS = ("restkv", "h2o", "streamingllm:positions=slot")


def contest(methods: tuple[str, ...] = METHODS, **other: Any) -> Contest:
    given: dict[str, Any] = {
        "preset": "tiny",
        "model": None,
        "dtype": "float32",
        "device": "cpu",
        "contexts": (150,),
        "batches": (1,),
        "budget": 48,
        "peers": (),
        "backend": "sdpa",
        "threads": 1,
        "rounds": 1,
        "tokens": 2,
        "peer_python": None,
        "prefills": (PATTERN,),
    }
    return Contest(methods=methods, **given | other)


# -- operations


@pytest.mark.parametrize("method", METHODS)
def test_operations_do_what_they_are_called(method: str) -> None:
    worker = Operations(contest().ours(method, PATTERN))
    answer(worker, "fill", context=150, batch=1)
    session = worker._running
    period, interval = session.schedule.period, session.schedule.interval
    assert period and interval

    def live() -> float:
        return sum(float(layer.live_counts().sum()) for layer in session.cache.layers) / (2 * 2)

    for _ in range(2):  # a second time as the first
        worker.prepare("evict")
        held = [layer.pages_held for layer in session.cache.layers]
        assert live() == 48 + interval
        worker.evict()
        assert live() == 48 and [layer.pages_held for layer in session.cache.layers] == held
        worker.prepare("compact")
        assert live() == 48 and sum(int(layer.used.sum()) for layer in session.cache.layers) == 4 * (48 + period)
        worker.compact()
        assert live() == 48 and sum(int(layer.used.sum()) for layer in session.cache.layers) == 4 * 48
    scored = answer(worker, "score", tokens=2, context=150)
    worker._running.cache.refresh()
    assert worker.describe()["kept"] == 48 and len(scored["seconds"]) == 2 and min(scored["seconds"]) > 0
    assert answer(worker, "prefill", context=150, batch=1)["kept"] == 48


def test_what_follows_a_step_is_counted_apart() -> None:
    worker = Operations(contest().ours("restkv:interval=8", "dense"))
    answer(worker, "fill", context=150, batch=1)
    said = answer(worker, "decode", tokens=16)
    due = sorted(range(16), key=lambda step: -said["evicting"][step])[:2]
    assert sorted(due) == [7, 15] and said["period"] == said["interval"] == 8
    assert all(0 <= evicting < lap for lap, evicting in zip(said["seconds"], said["evicting"], strict=True))
    assert len(answer(worker, "decode")["evicting"]) == 1


def test_each_policy_has_its_operations() -> None:
    assert set(operations_of(ReSTKV(64), True)) == set(OPERATIONS)
    assert operations_of(H2O(64, interval=None), False) == ("decode", "score")
    assert operations_of(FullCache(), True) == ("decode", "prefill")


# -- runs


class Here:
    """A measured process that is none, and that takes a tenth of a second more for the first of what it is said to compile."""

    def __init__(self, name: str, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self.compiles = ["decode", "prefill"] if arguments["backend"] == "flex" else []
        self.worker, self.graphs = Operations({**arguments, "backend": "sdpa"}), 0
        self.new = {"load", *self.compiles}

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        said = answer(self.worker, op, **values) if op != "load" else {"seconds": [0.0], "evicting": [0.0]}
        if self.compiles and op in self.new:
            self.new.remove(op)
            self.graphs += 1
            said["seconds"][0] += 0.1
        return json.loads(json.dumps(said | {"graphs": self.graphs, "compiles": self.compiles}))

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompilePlan, "_process", lambda self, *arguments: Here(*arguments))
    monkeypatch.setattr(compiling, "MOST_ANSWER", 4)


def test_a_run_goes_on_where_it_stopped_and_shows_what_it_measured(here: None, tmp_path: Path) -> None:
    plan, run = CompilePlan(contest(("restkv", "h2o")), jobs=5), tmp_path / "run"

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == (5 + 1) + (4 + 1) + 2
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        plan.run(run, stop)
    before = read_rows(run)
    assert {row["method"] for row in before} == {"restkv"}
    rows = read_rows(plan.run(run))
    assert rows[:6] == before and len(rows) == 13
    assert plan.run(run) == run and read_rows(run) == rows
    with pytest.raises(RunError, match="holds a run with budget 48, this one has 40"):
        CompilePlan(contest(("restkv", "h2o"), budget=40), jobs=5).run(run)

    of = {row["key"]: row for row in rows}
    assert [row["operation"] for row in rows[:5]] == list(OPERATIONS) and "h2o/prefill" not in of
    for name in ("restkv/decode", "h2o/decode", "restkv/prefill"):
        row = of[name]
        low, high = row["compiled_quartiles_ms"]
        assert 0 < low <= row["compiled_ms"] <= high and row["graphs"] == 1
        assert row["cold_s"] > 0 and row["warm_s"] > 0  # about 0.1, and a busy machine may add to it
    for name in ("restkv/evict", "h2o/compact", "h2o/score"):
        assert of[name]["compiled_ms"] is None is of[name]["cold_s"] and of[name]["eager_ms"] > 0
    assert of["restkv/evict"]["tokens"] == 128 and of["h2o/evict"]["tokens"] == 1 and of["h2o/compact"]["tokens"] == 32
    assert of["restkv/decode"]["laps"] == 2 == of["restkv/decode"]["warm_up"]
    assert of["restkv/decoding"]["eager_tokens"] == 128 and of["h2o/decoding"]["eager_tokens"] == 32
    assert all(row["compiled_step_ms"] < row["compiled_token_ms"] for row in rows if row["part"] == "decoding")
    assert sum(row["jobs"] for row in rows if row["part"] == "jobs") == 5 and read_manifest(run)["kind"] == "compile"
    assert "Does compiling pay?: tiny, random weights" in build(run)
    assert compiling.pictures(rows, run)[0].stat().st_size > 10_000
    (tmp_path / "compile.json").write_text(json.dumps(as_json(run)))
    wish: dict[str, Any] = {"from": "compile.json", "table": "Operations", "where": {"operation": ["eviction"]}}
    wish["columns"] = ["operation", "method", "compiled ms"]
    lines = quoted(f"<!-- quote {json.dumps(wish)} -->\n", tmp_path).splitlines()
    assert lines[-2:] == ["| eviction | restkv | eager only |", "| eviction | h2o | eager only |"]


ARGUMENTS = {"shape": "s", "dtype": "float32", "context": 4096, "budget": 512, "threads": 2, "jobs": 9}


def operation(name: str, compiled_ms: float | None, tokens: int) -> dict[str, Any]:
    some = compiled_ms is not None
    return {
        "part": "operation",
        "operation": name,
        "method": "restkv",
        "tokens": tokens,
        "laps": 80,
        "eager_ms": 50.0,
        "eager_quartiles_ms": [49.0, 51.0],
        "compiled_ms": compiled_ms,
        "compiled_quartiles_ms": [compiled_ms, compiled_ms] if some else None,
        "cold_s": 8.0 if some else None,
        "warm_s": 0.05 if some else None,
        "graphs": 1,
    }


def test_tables_say_after_how_many_tokens_compiling_has_paid() -> None:
    rows = [
        operation("evict", 10.0, 128),
        operation("decode", 10.0, 1),
        operation("prefill", 60.0, 4096),
        operation("compact", None, 128),
    ]
    jobs = {"part": "jobs", "graphs": 1, "jobs": 4}
    rows += [{**jobs, "method": "restkv", "new_graphs": 0}, {**jobs, "method": "h2o", "new_graphs": 2}]
    table, _, counted = shown(ARGUMENTS, rows)
    lines = {line[0]: line[2:] for line in table.lines}  # type: ignore[union-attr]
    eager = "50.0 (49.0-51.0)"
    assert lines["decode step"] == [eager, "10.0 (10.0-10.0)", "5.00", "8.0", "0.1", "200", "2", "1", "80"]
    assert lines["eviction"][5:7] == ["25,600", "256"] and lines["sparse prefill"][5:7] == ["never", "never"]
    assert lines["compaction"] == [eager, "eager only", "", "", "", "", "", "", "80"]
    assert list(lines) == ["decode step", "eviction", "sparse prefill", "compaction"]
    assert counted.lines[-1] == ["all", "8", "2", "2"]  # type: ignore[union-attr]
    assert tokens_until(0.0, 50, 10, 1) == 0 and tokens_until(1.0, 10, 10, 1) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--context 512", "context 512: leaves nothing to evict of a budget of 512; give a longer one"),
        ("--prefill chunked", "prefill 'chunked': computes all attention of 4096 tokens"),
        ("--prefill a-shape --context 3968", "prefill 'a-shape': computes all attention"),
        ("--methods ,", "no method is named"),
        ("--methods nothing", "method 'nothing' is unknown"),
        ("--methods restkv:window=600", "budget 512"),
        ("--preset nobody", "preset 'nobody' is unknown"),
        ("--rounds 0", "rounds 0: give whole numbers of at least 1"),
        ("--jobs -1", "--jobs"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    here: None, command: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "compile", *command.split(), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_a_process_that_dies_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def dies(*_: Any) -> None:
        raise WorkerDied("the worker restkv, sdpa died")

    monkeypatch.setattr(CompilePlan, "_process", dies)
    assert main(["bench", "compile", "--preset", "tiny", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "restkv: error: the worker restkv, sdpa died; what was measured before it is in --out\n"
    )


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench compile --preset tiny --dtype float32 --context 150 --budget 64 --methods restkv --prefill dense"
    command += " --rounds 1 --tokens 2 --jobs 0 --threads 1 --out"
    assert main([*command.split(), str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "Decoding over whole intervals" in printed and "compile.png" in printed
    of = {row["key"]: row for row in read_rows(tmp_path / "run")}
    step = of["restkv/decode"]
    assert step["graphs"] == 1 and step["cold_s"] > step["warm_s"] > 0 and step["compiled_ms"] > 0
    assert of["restkv/decoding"]["cold_s"] > step["cold_s"]  # the compiler had to be loaded

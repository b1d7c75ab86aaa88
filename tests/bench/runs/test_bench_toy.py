"""A new benchmark is one file: this one is run, killed, gone on with, reported and quoted without a word of it anywhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

import restkv
from bench.cli.options import run_plan
from bench.report.page import as_json, build, markdown
from bench.report.quote import quoted
from bench.report.stats import mean_interval
from bench.report.tables import by_cell
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, Line, Part, Table, benchmark, register
from bench.runs.folder import MANIFEST, SAMPLES, RunError, read_rows
from bench.runs.methods import Method, check, parse_methods
from bench.runs.plans import Cell, cells_of, policy_of
from bench.runs.rows import FORMAT, Row
from bench.runs.run import Batch, Work, run
from bench.runs.together import under_each
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError
from restkv.session import Session

# -- the benchmark: is the token after a prompt and a word of it the one that the full cache expects?


@dataclass(frozen=True)
class EchoPlan:
    words: tuple[str, ...]
    methods: tuple[Method, ...]
    budgets: tuple[int, ...]
    kind: ClassVar[str] = "echo"

    def work(self, lm: restkv.LM) -> Work:
        cells = cells_of(self.methods, self.budgets)
        for cell in cells:
            check(lm, cell.method, int(cell.asked), 30, f"budget {cell.asked}")
        batches = [
            Batch([f"{word}/{cell.key}" for cell in cells], partial(echo, lm, word, cells)) for word in self.words
        ]
        arguments = {"words": list(self.words), "budgets": list(self.budgets)}
        return Work(arguments, self.methods, max(self.budgets), batches)


def echo(lm: restkv.LM, word: str, cells: Sequence[Cell]) -> list[Row]:
    prompt, later = lm.encode(f"The {word} kettle is by the door. " * 6), lm.encode(f" {word}")

    def likeliest(session: Session) -> list[int]:
        session.extend([later] * len(session.active))
        return session.logits_BV.argmax(-1).tolist()

    policies = [policy_of(lm, cell, int(cell.asked), prompt, once=True) for cell in cells]
    told = under_each(lm, policies, prompt, len(later), likeliest, extends=True)
    truth = told[0][1]  # of the full cache
    return [
        cell.row(int(cell.asked), policy, held, {"word": word}, {"same": float(token == truth)})
        for cell, policy, (held, token) in zip(cells, policies, told, strict=True)
    ]


def parts(arguments: Mapping[str, Any], rows: Sequence[Line]) -> list[Part]:
    lines = [
        [method, f"{asked:g}", mean_interval([row["same"] for row in some]).show()]
        for method, asked, some in by_cell(rows, arguments)
    ]
    return [Table("The same next token", ["method", "at", "share [95 %]"], lines)]


ECHO = Benchmark("echo", "Echo", parts, {"word": must.name, "same": must.SCORE}, {"words": must.many(must.name, 1)})
register(ECHO)

# -- what it gets for that


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


def plan(budgets: tuple[int, ...] = (8, 16)) -> EchoPlan:
    return EchoPlan(("amber", "red", "old"), tuple(parse_methods("restkv:window=4,streamingllm")), budgets)


@pytest.fixture(scope="module")
def whole(lm: restkv.LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(lm, plan(), tmp_path_factory.mktemp("echo") / "run")


def test_rows_are_of_one_type(whole: Path) -> None:
    rows = read_rows(whole)
    manifest = json.loads((whole / MANIFEST).read_text())
    assert len(rows) == manifest["arguments"]["results"] == 3 * (1 + 2 * 2)
    assert manifest["format"] == FORMAT and set(manifest["methods"]) == {"full", "restkv:window=4", "streamingllm"}
    cell = ["method", "preset", "asked", "entries", "granularity", "budget", "observed", "kept", "bytes"]
    assert all(list(row) == ["key", "word", *cell, "same", "versions"] for row in rows)
    assert [row["entries"] for row in rows[:3]] == [None, 8, 16]


def test_a_stopped_run_ends_with_the_file_of_an_unbroken_one(lm: restkv.LM, whole: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 15
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        run(lm, plan(), tmp_path / "run", stop)
    lines = (whole / SAMPLES).read_bytes()
    assert (tmp_path / "run" / SAMPLES).read_bytes() == b"".join(lines.splitlines(keepends=True)[:7])
    assert "7 of 15 results" in markdown(tmp_path / "run")
    with open(tmp_path / "run" / SAMPLES, "ab") as file:
        file.write(lines.splitlines(keepends=True)[7][:30])  # what a kill leaves
    assert (run(lm, plan(), tmp_path / "run") / SAMPLES).read_bytes() == lines
    with pytest.raises(
        RunError, match=r"holds a run with budgets \[8, 16\], this one has \[12\]; choose another --out"
    ):
        run(lm, plan((12,)), tmp_path / "run")
    with pytest.raises(PolicyError, match="restkv:window=4: 2 entries per head"):
        run(lm, plan((2,)), tmp_path / "other")


def test_it_is_reported_and_quoted_as_any_other(
    lm: restkv.LM, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark("echo") is ECHO
    assert "<h1>Echo: " in build(whole) and "The same next token" in build(whole)
    run_plan(lm, plan(), whole)
    assert "The same next token" in capsys.readouterr().out
    assert main(["bench", "report", "--markdown", str(whole)]) == 0
    assert "| restkv:window=4 | 8 | " in capsys.readouterr().out
    (tmp_path / "echo.json").write_text(json.dumps(as_json(whole)))
    text = '<!-- quote {"from": "echo.json", "table": "The same", "methods": ["full"]} -->\n'
    assert quoted(text, tmp_path).endswith("| full | 1 | 1.000 [1.000, 1.000] |\n")


def test_a_row_that_is_not_as_it_says_is_named(whole: Path, tmp_path: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    del manifest["check"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    row = {**read_rows(whole)[1], "same": 2}
    (tmp_path / SAMPLES).write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match=f"in the result '{row['key']}', same is 2"):
        markdown(tmp_path)

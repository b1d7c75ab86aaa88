"""What the bench commands cannot use is said in one line that names it, before anything is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report.kinds import progress
from bench.runs.folder import read_manifest, read_rows
from restkv.cli import main

LONE = {"text": "half a pair \ud800 here"}  # JSON can spell it, UTF-8 cannot
TINY = ("--context", "8", "--tokens", "4", "--windows", "1", "--methods", "restkv")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with some files that are not as they should be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lone.jsonl").write_text("\n".join(map(json.dumps, [{"text": "fine"}, LONE])))
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("An essay.")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "anli" / "R1").mkdir(parents=True)
    asked = {"input": "A text.", "instructions": ["Why?"], "outputs": ["So."]}
    (tmp_path / "leval.jsonl").write_text(json.dumps(asked))
    row = {"premise": "half \ud800", "hypothesis": "b", "label": "n"}
    (tmp_path / "anli" / "R1" / "test.jsonl").write_text(json.dumps(row))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench ruler --compression nan", "compression nan: the prompt over what is kept; give at least 1"),
        ("bench ruler --compression 8,0.5", "compression 0.5: the prompt over what is kept"),
        ("bench needle --compression nan --samples 1", "compression nan"),
        (
            "bench ruler --lengths 256 --compression 500",
            "compression 500: the prompt over what is kept; give at least 1, and at most its 256 tokens",
        ),
        ("bench smoothing --compression inf", "compression inf: the prompt over what is kept; give at least 1"),
        ("bench smoothing --length 1", "length 1: give at least 2"),
        ("bench smoothing --tail 0", "tail 0: give at least 2"),
        ("bench smoothing --samples 0", "samples 0: give at least 1"),
        (
            "bench needle-official --data essays --lengths 5000:1000:100",
            "--lengths '5000:1000:100': give FIRST:LAST:STEP",
        ),
        ("bench needle-official --data essays --lengths 1000:5000:0", "--lengths '1000:5000:0': give FIRST:LAST:STEP"),
        ("bench needle-official --data latin --lengths 1000", "b.txt: not UTF-8 text (byte 3); convert it first"),
        ("bench perplexity --data none", "none: cannot be read (No such file"),
        (
            "bench perplexity --data lone.jsonl",
            "lone.jsonl, line 2: field 'text' has '\\ud800' at place 12, which is no character",
        ),
        ("bench documents --data none", "none: cannot be read (No such file"),
        ("bench documents --data lone.jsonl", "lone.jsonl, line 1: no field 'input'; the row has text"),
        ("bench documents --data leval.jsonl --compression nan", "compression nan: the prompt over what is kept"),
        ("bench documents --data leval.jsonl --evict never", "--evict 'never' is not known; choose prompt or always"),
        ("bench documents --data leval.jsonl --chat", "has no chat template"),
        ("bench anli --data anli --rounds 1", "line 1: field 'premise' has '\\ud800' at place 5"),
        ("bench ruler --methods restkv:budget_by=1 --samples 1", "budget_by 1: choose from uniform"),
        ("bench ruler --methods snapkv:kernel_size=true --samples 1", "kernel_size True: give an odd number"),
        ("bench ruler --methods restkv:interval=99999999999999999999", "give a number below 2147483648"),
        ("bench kept --out nowhere/x.png", "nowhere/x.png: there is no folder nowhere"),
        ("bench report . --markdown --json", "--markdown and --json: give one"),
        ("methods --context 5", "give it with --bytes MODEL"),
        ("generate -p hello --chunk 64", "--chunk 64: only --prefill chunked"),
        ("generate -p hello --budget 99999999999999999999", "give a number below 2147483648"),
        ("generate -p hello --seed 99999999999999999999", "seed=99999999999999999999 is not possible"),
        ("demo --compression nan", "'--compression': Input should be greater than or equal to 1"),
    ],
)
def test_one_line_says_what_and_where(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    before = sorted(place.rglob("*"))
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and words in err
    assert sorted(place.rglob("*")) == before


def test_one_entry_per_head_is_a_budget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "perplexity", "--budgets", "1", *TINY, "--out", "run"]) == 0
    rows = [json.loads(line) for line in (place / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["budget"], row["observed"], row["kept"]) for row in rows if row["method"] == "restkv"] == [(1, 1, 1)]


def test_what_is_named_twice_is_run_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = "--lengths 256,256 --tasks vt,vt --samples 1 --methods restkv --compression 8,8 --question aware"
    assert main(["bench", "ruler", *tasks.split(), "--out", "run"]) == 0
    assert progress("ruler", read_manifest(place / "run")["arguments"], read_rows(place / "run")) == (2, 2)
    assert main(["bench", "perplexity", "--budgets", "8,8,0.5,0.50", *TINY, "--out", "texts"]) == 0
    assert read_manifest(place / "texts")["arguments"]["budgets"] == [8, 0.5]

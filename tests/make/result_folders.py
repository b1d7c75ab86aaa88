"""Folders of results of every benchmark, as runs would have left them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, open_run
from make.result_rows import KINDS, METHODS
from restkv.cli import main

CHOICE = {"part": "choice", "question": "aware", "task": "R1", "score": 1.0, "kept": 9.0}


READ = {"part": "perplexity", "kept": 9.5, "nll": 60.5, "tokens": 20, "words": 9, "text_bytes": 55}


JUDGED = {
    "part": "letters",
    "question": "aware",
    "document": 0,
    "tokens": 80,
    "answer_tokens": 1,
    "kl": 0.25,
    "top1": 0.5,
    "nll": 1.5,
    "full_nll": 1.0,
    "score": 1.0,
    "kept": 9.5,
}


ASKED = {
    "protocol": "official",
    "checkpoint": "x",
    "model": "llama-2x8-float32-00",
    "max_length": None,
    "budgets": [16, 0.5],
}


ANSWERED = {"task": "qasper", "score": 0.5, "kept": 9.5, "wording": "own", "chat": False, "tokens": 90, "cut": 0}


def cells(
    arguments: dict[str, Any], rates: list[Any], name: str, full: Any, row: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row of every method and rate, three times."""
    return [
        {"key": f"{index}/{method}/{rate}", **row, "index": index, "window": index, "method": method, name: rate}
        for index in range(3)
        for method in arguments["methods"]
        for rate in ([full] if method == "full" else rates)
    ]


def smoothing(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    rows = cells(arguments, [4.0, 8.0], "asked", 1.0, READ)
    return rows + [{**row, "key": "choice/" + row["key"]} for row in cells(arguments, [4.0, 8.0], "asked", 1.0, CHOICE)]


ALL: dict[str, tuple[dict, Callable[[dict], list[dict]]]] = {
    **KINDS,
    "anli": (
        {"methods": METHODS, "tasks": ["R1"], "results": 9},
        lambda arguments: cells(arguments, [0.25], "asked", 1.0, CHOICE),
    ),
    "perplexity": (
        {"methods": METHODS, "protocol": "prefill", "tokens": 20, "context": 40, "chunk": 0, "results": 9},
        lambda arguments: cells(arguments, [8], "asked", 1.0, READ),
    ),
    "smoothing": (
        {"methods": METHODS, "compression": [4.0, 8.0], "tasks": ["R1"], "results": 30},
        smoothing,
    ),
    "documents": (
        {"methods": METHODS, "compression": [4.0, 8.0], "answer": "gold", "score": "letters", "results": 15},
        lambda arguments: cells(arguments, [4.0, 8.0], "asked", 1.0, JUDGED),
    ),
    "longbench": (
        {"methods": METHODS, "tasks": ["qasper"], "lengths": [], "results": 15, **ASKED},
        lambda arguments: cells(arguments, [16, 0.5], "asked", 1.0, {**ANSWERED, "length": None, "depth": None}),
    ),
    "needle-official": (
        {"methods": METHODS, "tasks": ["qasper"], "lengths": [260], "results": 15, **ASKED},
        lambda arguments: cells(arguments, [16, 0.5], "asked", 1.0, {**ANSWERED, "length": 260, "depth": 0.5}),
    ),
}


def manifest_of(kind: str) -> dict[str, Any]:
    arguments = ALL[kind][0]
    return {
        "format": 2,
        "kind": kind,
        "arguments": copy.deepcopy(arguments),
        "versions": {"restkv": "0", "torch": "2"},
        "methods": {label: {"preset": None, "policy": {"name": label}} for label in arguments["methods"]},
        "model": {"fingerprint": "llama-x"},
        "machine": {"cores": 2},
        "started": "2026-01-01",
    }


def write(folder: Path, manifest: Any, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / TIMINGS).write_text('{"key": "a", "seconds": 1800}\n')
    return folder


def filled(folder: Path, kind: str = "ruler") -> Path:
    """A folder as a run of this version leaves it, with check values."""
    arguments, make = ALL[kind]
    details = {name: manifest_of(kind)[name] for name in ("methods", "model")}
    with open_run(folder, kind, arguments, details) as run:
        for row in make(arguments):
            run.add(row["key"], {name: value for name, value in row.items() if name != "key"})
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("restkv: error: ") and line.isprintable() and len(line) < 1000
    return line

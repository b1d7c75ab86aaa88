"""Tables, pages and commands of the published benchmarks: the papers' layout, and their figures beside ours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.published.tables import published
from bench.published.tables import published_parts as parts
from bench.report.page import build, markdown
from bench.report.tables import Table
from bench.runs.folder import MANIFEST, read_manifest, read_rows
from make.official_files import (
    write_essays,
    write_longbench,
    write_ruler,
)
from make.places import ROOT
from restkv.cli import main
from restkv.cli.options import RECALL

# -- commands and reports


def test_the_commands_print_tables_and_one_line_for_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_longbench(tmp_path / "data", 1, ["hotpotqa"])
    given = ["--data", str(data), "--methods", "restkv:window=4", "--budgets", "16"]
    assert main(["bench", "longbench", *given, "--model", str(RECALL), "--out", str(tmp_path / "long")]) == 0
    shown = capsys.readouterr().out
    assert "hotpotqa" in shown and "own wording" in shown and "minus full" in shown
    ruled = write_ruler(tmp_path / "ruler", [128])
    command = ["bench", "ruler-official", str(RECALL), "--data", str(ruled), "--tasks", "vt", *given[2:]]
    assert main([*command, "--lengths", "128", "--out", str(tmp_path / "rule")]) == 0
    assert "in the data files" in capsys.readouterr().out
    essays = write_essays(tmp_path / "essays")
    command = [
        "bench",
        "needle-official",
        "--data",
        str(essays),
        "--lengths",
        "260:280:20",
        "--depths",
        "2",
        *given[2:],
    ]
    assert main([*command, "--out", str(tmp_path / "needle")]) == 0
    assert {row["length"] for row in read_rows(tmp_path / "needle")} == {260, 280}
    capsys.readouterr()
    for bad, message in (
        (["longbench", "--data", str(tmp_path)], f"{tmp_path}: no file of any task"),
        (["infinitebench", "--data", str(data), "--tasks", "lcc"], "task 'lcc' is not known"),
        (["longbench", str(tmp_path), "--model", "x", "--data", str(data)], "two models are given"),
        (["longbench", "--data", str(data), "--budgets", "x"], "--budgets 'x'"),
    ):
        assert main(["bench", *bad, "--out", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"restkv: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def rows_of(arguments: dict[str, Any], tasks: list[str], score: dict[str, float]) -> list[dict[str, Any]]:
    """Rows that only tables are made of."""
    rows = []
    for task in tasks:
        for index in range(2):
            for method in arguments["methods"]:
                for budget in [1.0] if method == "full" else arguments["budgets"]:
                    about = {
                        "task": task,
                        "length": None,
                        "depth": None,
                        "index": index,
                        "method": method,
                        "asked": budget,
                    }
                    asked = {
                        "wording": "own wording",
                        "chat": False,
                        "tokens": 100,
                        "cut": index,
                        "kept": 100 if method == "full" else budget,
                    }
                    rows.append({**about, **asked, "score": score[method] / (1 + index)})
    return rows


ARGUMENTS: dict[str, Any] = {
    "protocol": "official",
    "checkpoint": "Llama-3.1-8B-Instruct",
    "model": "llama-32x4096-bfloat16-0123456789abcdef",
    "methods": ["full", "restkv@paper-longbench", "snapkv"],
    "budgets": [64, 256],
    "max_length": 7500,
    "tasks": ["hotpotqa", "lcc"],
    "lengths": [],
    "results": 20,
}


def test_tables_have_the_papers_layout_and_its_figures_beside_ours() -> None:
    rows = rows_of(ARGUMENTS, ["hotpotqa", "lcc"], {"full": 0.8, "restkv@paper-longbench": 0.6, "snapkv": 0.4})
    layout, means, asked, _ = parts("longbench", ARGUMENTS, rows)
    assert isinstance(layout, Table) and isinstance(means, Table) and isinstance(asked, Table)
    assert list(layout.columns) == ["method", "budget", "hotpotqa", "lcc", "mean"]
    assert list(layout.lines[0]) == ["full", "", "60.00", "60.00", "60.00"]  # (80 + 40) / 2
    assert [tuple(line[:2]) for line in layout.lines[1:]] == [
        ("restkv@paper-longbench", "64"),
        ("snapkv", "64"),
        ("restkv@paper-longbench", "256"),
        ("snapkv", "256"),
    ]
    assert "published for Llama-3.1-8B-Instruct" in means.caption
    ours = {tuple(line[:2]): list(line) for line in means.lines}
    assert ours["full", ""][-2:] == ["39.96", "+20.04"]
    assert ours["restkv@paper-longbench", "64"][-2:] == ["33.56", "+11.44"]  # 45 - 33.56
    assert ours["snapkv", "256"][-2:] == ["36.07", "-6.07"] and ours["snapkv", "256"][4].startswith("-30.00")
    assert list(asked.lines[0]) == ["hotpotqa", "own wording", "no", "100", "100", "1", "2"]


def test_published_figures_need_the_model_and_the_budget() -> None:
    assert published("longbench", ARGUMENTS)[0] == "Llama-3.1-8B-Instruct"
    assert published("longbench", {**ARGUMENTS, "model": "llama-2x64-float32-0"}) == ("", {})
    assert published("longbench", {**ARGUMENTS, "checkpoint": "recall-mini"}) == ("", {})
    for name, model in (
        ("Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("Llama-2-7b-chat-hf", "Llama-2-7B-Chat"),
    ):
        assert published("longbench", {**ARGUMENTS, "checkpoint": name})[0] == model  # as their folders are called
    assert published("infinitebench", ARGUMENTS) == ("", {})
    _, figures = published("ruler-official", ARGUMENTS)
    assert figures["restkv", 1024, 131072] == 68.28 and figures["full", None, 4096] == 99.34
    other = {**ARGUMENTS, "budgets": [100]}
    rows = rows_of(other, ["lcc"], dict.fromkeys(ARGUMENTS["methods"], 0.5))
    means = parts("longbench", other, rows)[1]
    assert isinstance(means, Table) and [line[-2] for line in means.lines] == ["39.96", "", ""]


def test_an_ablated_method_stands_beside_the_published_ablation_or_nothing() -> None:
    labels = [
        "full",
        "restkv@paper-longbench",
        "restkv@paper-longbench:alpha=none",
        "restkv@paper:alpha=0.5",
        "restkv@paper:window=16",
        "restkv",
    ]
    arguments = {**ARGUMENTS, "methods": labels, "budgets": [128]}
    means = parts("longbench", arguments, rows_of(arguments, ["lcc"], dict.fromkeys(labels, 0.5)))[1]
    assert isinstance(means, Table)
    assert {line[0]: line[-2] for line in means.lines} == dict(
        zip(labels, ["39.96", "35.86", "34.15", "35.51", "", ""], strict=True)
    )


MODELS = {  # in the tables of docs/sources.md: of our own name, and in the shape that its configuration has
    "Llama-3.1-8B-Instruct": "llama-32x4096",
    "Llama-2-7B-Chat": "llama-32x4096",
    "Mistral-7B-Instruct-v0.3": "mistral-32x4096",
}


def test_published_figures_are_those_of_the_sources() -> None:
    """Read anew from the tables of docs/sources.md §5, cell by cell."""
    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    methods = ["streamingllm", "h2o", "tova", "snapkv", "restkv"]
    for model, shape in MODELS.items():
        line = re.search(rf"^\| {re.escape(model)} \(([\d.]+)\) \|(.*)\|$", text, re.M)
        assert line is not None
        expected: dict[tuple[Any, ...], float] = {("full", None, None): float(line[1])}
        for method, cell in zip(methods, line[2].split("|"), strict=True):
            means = map(float, cell.split("/"))
            expected |= {(method, b, None): mean for b, mean in zip((64, 128, 256, 512, 1024), means, strict=True)}
        if model == "Llama-3.1-8B-Instruct":
            expected |= ablations(text)
        assert published("longbench", {"checkpoint": model, "model": f"{shape}-bfloat16-0"}) == (model, expected)
    _, figures = published("ruler-official", ARGUMENTS)
    assert len(figures) == 5 * 6
    lines = re.findall(r"^\| (\S+) \| ((?:\d+\.\d+/){6}\d+\.\d+) \|$", text, re.M)
    assert len(lines) == 5
    for name, values in lines:
        *scores, average = map(float, values.split("/"))
        method, budget = name.lower().replace("-", ""), None if name == "Full" else 1024
        assert [figures[method, budget, 4096 << step] for step in range(6)] == scores
        assert sum(scores) / 6 == pytest.approx(average, abs=0.006)


def ablations(text: str) -> dict[tuple[Any, ...], float]:
    """The options varied at a budget of 128: by alpha, the plain mean, by scale, plain averaging."""
    number = r"\d+\.\d+"
    alphas = re.search(
        rf"^\| α 0\.1 to 0\.9 \| ((?:{number} ?){{9}})\|\n\| the plain mean \| ({number}) \|$", text, re.M
    )
    scales = re.search(
        rf"^\| scale ([\d, ]+) \| ((?:{number} ?){{8}})\|\n\| plain averaging of 5 \| ({number}) \|$", text, re.M
    )
    assert alphas is not None and scales is not None
    named = {f"alpha=0.{tenth}": value for tenth, value in enumerate(alphas[1].split(), 1)}
    named |= {f"scale={scale}": value for scale, value in zip(scales[1].split(", "), scales[2].split(), strict=True)}
    named |= {"alpha=none": alphas[2], "pooling=avg": scales[3]}
    return {(f"restkv:{option}", 128, None): float(value) for option, value in named.items()}


@pytest.mark.parametrize("kind", ("longbench", "infinitebench", "ruler-official", "needle-official"))
def test_reports_show_a_run_of_every_benchmark(kind: str, finished: dict[str, Path]) -> None:
    pytest.importorskip("matplotlib")
    page, text = build(finished[kind]), markdown(finished[kind])
    wording = "in the data files" if kind == "ruler-official" else "own wording"
    assert wording in page and wording in text
    assert "How it was asked" in page and "<img" in page and "| restkv:window=4 | 16 |" in text


def test_reports_of_a_published_model_show_its_figures(finished: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(finished["longbench"], tmp_path / "run")
    manifest = read_manifest(folder)
    manifest["arguments"] |= {name: ARGUMENTS[name] for name in ("checkpoint", "model")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for shown in (build(folder), markdown(folder)):
        assert "published for Llama-3.1-8B-Instruct" in shown and "39.96" in shown
    assert "39.96" not in markdown(finished["longbench"])

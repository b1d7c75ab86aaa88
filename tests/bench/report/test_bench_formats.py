"""Results that earlier versions wrote are reported as they were, and a new benchmark is one object."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from bench.report.page import as_json, build, markdown
from bench.report.quote import ROOT, table
from bench.runs import schema
from bench.runs.benchmark import MODULES, benchmark, names
from bench.runs.folder import MANIFEST, SAMPLES, RunError, open_run, read_manifest, read_rows
from bench.runs.rows import FORMAT
from bench.speed.shown import table as contest_table
from bench.speed.shown import title as contest_title

# Runs of format 1, of every kind, and what the version that wrote them reported (report.json).
EARLIER = ROOT / "tests" / "data" / "format1"
FOLDERS = sorted(EARLIER.iterdir())
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


KINDS_OF_1 = {"ruler", "needle", "fidelity", "anli", "perplexity", "smoothing"} | {
    "longbench", "infinitebench", "ruler-official", "needle-official"
}  # fmt: skip


def test_there_is_a_folder_of_every_kind_that_format_1_knew() -> None:
    assert {read_manifest(folder)["kind"] for folder in FOLDERS} == KINDS_OF_1 <= set(MODULES) <= set(names())


@pytest.mark.parametrize("checked", [True, False], ids=["check values", "none"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folders_of_format_1_are_reported_as_they_were(folder: Path, checked: bool, tmp_path: Path) -> None:
    before = json.loads((folder / "report.json").read_text())
    run = shutil.copytree(folder, tmp_path / "run")
    if not checked:  # as still earlier versions wrote them
        del before["manifest"]["check"]
        (run / MANIFEST).write_text(json.dumps(before["manifest"]))
        rows = [json.loads(line) for line in (run / SAMPLES).read_text().splitlines()]
        (run / SAMPLES).write_text("".join(json.dumps({**row, "check": None}) + "\n" for row in rows))
    assert as_json(run) == before
    page = build(run)
    assert all(part["caption"].replace("&", "&amp;").replace("'", "&#x27;") in page for part in before["tables"])
    names_of_rows = {name for row in read_rows(run) for name in row}
    assert names_of_rows >= {"method", "preset", "asked", "entries", "granularity", "budget", "observed", "kept"}
    assert "compression" not in names_of_rows


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_altered_folder_of_format_1_has_tables_or_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = {name: value for name, value in read_manifest(folder).items() if name != "check"}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    rng, refused = random.Random(folder.name), 0
    for _ in range(60):
        altered = [{**row, "check": None} for row in rows[:6]]
        row = rng.choice(altered)
        field = rng.choice([name for name in row if name != "key"])
        row[field] = rng.choice([None, -1, 2, 1e300, "x", [], [[]], {}, True])
        if rng.random() < 0.3:
            del row[field]
        (tmp_path / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in altered))
        try:
            assert "|" in markdown(tmp_path)
        except RunError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 0 < refused < 60


def test_a_run_of_another_format_is_not_gone_on_with(tmp_path: Path) -> None:
    run = shutil.copytree(EARLIER / "anli", tmp_path / "run")
    manifest = read_manifest(run)
    before = (run / SAMPLES).read_bytes()
    with (
        pytest.raises(RunError, match=f"holds a run of format 1, this version writes {FORMAT}; choose another --out"),
        open_run(run, "anli", manifest["arguments"], {}),
    ):
        pass
    assert (run / SAMPLES).read_bytes() == before


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_committed_result_can_be_shown_and_quoted(path: Path) -> None:
    said = json.loads(path.read_text("utf-8"))
    if "contest" in said:  # speed and memory: the rows themselves are kept
        columns, lines = contest_table(said)
        assert contest_title(said) and lines and all(len(line) == len(columns) for line in lines)
        return
    manifest = said["manifest"]
    found = benchmark(manifest["kind"])
    schema.require(schema.MADE, manifest)
    schema.require(found.arguments, manifest["arguments"])
    assert found.total(manifest["arguments"]) == said["total"] and said["tables"]
    for part in said["tables"]:
        assert all(len(line) == len(part["columns"]) for line in part["lines"])
        quoted = lines_of(table({"from": path.name, "table": part["caption"]}, path.parent))
        assert quoted == len(part["lines"])


def lines_of(markdown: str) -> int:
    """Lines of a table below its head."""
    return len(markdown.splitlines()) - 2

"""Folders of results that were edited, mixed up or made by something else: a page, or one line that says what and where."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.report.figures import Grid, heat_maps
from bench.report.kinds import read_run
from bench.report.page import build, latex, markdown
from bench.runs import lines
from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, RunError, open_run, read_rows
from make.hostile import alter_remarks
from make.result_rows import FIDELITY, KINDS, METHODS
from restkv.cli import main
from restkv.errors import OutputError, RestKVError

CHOICE = {"part": "choice", "question": "aware", "task": "R1", "score": 1.0, "kept": 9.0}
READ = {"part": "perplexity", "kept": 9.5, "nll": 60.5, "tokens": 20, "words": 9, "text_bytes": 55}
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
    "longbench": (
        {"methods": METHODS, "tasks": ["qasper"], "lengths": [], "results": 15, **ASKED},
        lambda arguments: cells(arguments, [16, 0.5], "budget", None, {**ANSWERED, "length": None, "depth": None}),
    ),
    "needle-official": (
        {"methods": METHODS, "tasks": ["qasper"], "lengths": [260], "results": 15, **ASKED},
        lambda arguments: cells(arguments, [16, 0.5], "budget", None, {**ANSWERED, "length": 260, "depth": 0.5}),
    ),
}


def manifest_of(kind: str) -> dict[str, Any]:
    arguments = ALL[kind][0]
    return {
        "format": 1,
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write to it."""
    return filled(tmp_path_factory.mktemp("whole") / "run")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("restkv: error: ") and line.isprintable() and len(line) < 1000
    return line


# -- altered anyhow


@pytest.mark.parametrize("kind", ALL)
def test_an_unaltered_folder_has_tables_and_a_page(kind, tmp_path):
    folder = write(tmp_path / "run", manifest_of(kind), ALL[kind][1](ALL[kind][0]))
    assert "|" in markdown(folder) and "tabular" in latex(folder)
    if kind in ("smoothing", "longbench"):
        assert "<table" in build(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(sorted(ALL)))
def test_an_altered_folder_has_tables_or_is_refused_in_one_line(data, kind, tmp_path_factory):
    manifest, rows = manifest_of(kind), ALL[kind][1](ALL[kind][0])[:12]
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            manifest = alter_remarks(data.draw, manifest)
        else:
            place = data.draw(st.integers(0, len(rows) - 1))
            rows[place] = alter_remarks(data.draw, rows[place])
    folder = write(tmp_path_factory.getbasetemp() / "altered-run", manifest, rows)
    try:
        assert isinstance(markdown(folder), str)
    except RestKVError as error:
        text = str(error)
        assert text.startswith((str(folder), "result ", "tables ")) and text.isprintable() and len(text) < 1000


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["ruler", "perplexity", "fidelity", "needle-official"]))
def test_numbers_at_the_ends_of_their_ranges_can_be_drawn(data, kind, tmp_path_factory):
    rows = ALL[kind][1](ALL[kind][0])[:12]
    for row in rows:
        for name in {"score", "kl", "nll", "kept"} & row.keys():
            row[name] = data.draw(
                st.sampled_from([0, 1, 1.0, 0.5] + ([1e15, -1e15, 1e-300] if name != "score" else []))
            )
    folder = write(tmp_path_factory.getbasetemp() / "drawn-run", manifest_of(kind), rows)
    try:
        assert "</html>" in build(folder)
    except RestKVError as error:
        assert str(error).isprintable()


# -- one by one


MANIFESTS: dict[str, tuple[Any, str]] = {
    "a list": ([], "not a manifest of format 1"),
    "no kind": ({"kind": None}, "kind is None"),
    "an unknown kind": ({"kind": "speed"}, "a run of kind 'speed'; pages are made of ruler"),
    "a kind that cannot be looked up": ({"kind": []}, "kind is []"),
    "arguments": ({"arguments": 3}, "arguments is 3"),
    "methods": ({"methods": ["full"]}, "methods is ['full']"),
    "a method": ({"methods": {"full": 3}}, "methods is {'full': 3}"),
    "versions": ({"versions": "1.0"}, "versions is '1.0'"),
    "a model": ({"model": "m"}, "model is 'm'"),
    "a machine": ({"machine": [1]}, "machine is [1]"),
    "a time": ({"started": 2026}, "started is 2026"),
    "NaN": ({"machine": {"cores": float("nan")}}, "not a manifest"),
    "a huge number": ({"machine": {"cores": 10**400}}, "machine is"),
    "half a character": ({"started": "\ud800"}, "not a manifest"),
    "another format": ({"format": 3}, "not a manifest of format 1"),
}


@pytest.mark.parametrize(("change", "words"), MANIFESTS.values(), ids=MANIFESTS)
@pytest.mark.parametrize("way", [(), ("--json",)])
def test_a_manifest_of_wrong_types_is_one_line(change, words, way, tmp_path, capsys):
    manifest = manifest_of("ruler")
    manifest = {**manifest, **change} if isinstance(change, dict) else change
    folder = write(tmp_path / "run", manifest, ALL["ruler"][1](ALL["ruler"][0]))
    line = said(capsys, "bench", "report", folder, *way)
    assert words in line and str(folder) in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": "full"}, "methods is 'full'"),
        ({"samples": "4"}, "samples is '4'"),
        ({"lengths": [2**70]}, "lengths is"),
        ({"compression": [0]}, "compression is [0]"),
        ({"question": "why"}, "question is 'why'"),
        ({"depths": None}, "depths is None"),
    ],
)
def test_arguments_of_wrong_types_are_named(change, words, tmp_path, capsys):
    manifest = manifest_of("ruler")
    manifest["arguments"] |= change
    folder = write(tmp_path / "run", manifest, ALL["ruler"][1](ALL["ruler"][0]))
    assert f"manifest.json/arguments: {words}" in said(capsys, "bench", "report", folder, "--markdown")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("ruler", {"score": "1.0"}, "score is '1.0'"),
        ("ruler", {"score": 7}, "score is 7"),
        ("ruler", {"score": True}, "score is True"),
        ("ruler", {"score": 10**400}, "score is a huge number"),
        ("ruler", {"score": None}, "score is None"),
        ("ruler", {"kept": -1}, "kept is -1"),
        ("ruler", {"method": "mine"}, "method is 'mine', which is not among the run's methods"),
        ("ruler", {"length": 300}, "length is 300, which is not among the run's lengths"),
        ("ruler", {"question": ["aware"]}, "question is ['aware']"),
        ("fidelity", {"part": {}}, "part is {}"),
        ("fidelity", {"error": 3}, "error is 3"),
        ("perplexity", {"tokens": 0}, "tokens is 0"),
        ("perplexity", {"nll": "1"}, "nll is '1'"),
        ("longbench", {"budget": 17}, "budget is 17, which is not among the run's budgets"),
        ("longbench", {"chat": "no"}, "chat is 'no'"),
    ],
)
def test_a_result_of_wrong_types_is_named(kind, change, words, tmp_path, capsys):
    rows = ALL[kind][1](ALL[kind][0])
    rows[1] |= change
    folder = write(tmp_path / "run", manifest_of(kind), rows)
    line = said(capsys, "bench", "report", folder, "--markdown")
    assert f"in the result {rows[1]['key']!r}, {words}" in line and f"delete its line of {SAMPLES}" in line


@pytest.mark.parametrize(
    "line",
    ['{"key": "a", "score": NaN}', '{"key": "a", "score": 1e999}', '{"key": []}', "[" * 99999, '{"key": "\\ud800"}'],
)
def test_a_line_that_is_no_result_is_named(line, tmp_path, capsys):
    folder = write(tmp_path / "run", manifest_of("ruler"), [])
    (folder / SAMPLES).write_text(f"{line}\n")
    assert "line 1 is not a result; delete it" in said(capsys, "bench", "report", folder)


def test_layers_that_differ_from_row_to_row_are_one_line(tmp_path, capsys):
    rows = ALL["fidelity"][1](FIDELITY)
    rows[2]["error"] = [0.5] * 9
    folder = write(tmp_path / "run", manifest_of("fidelity"), rows)
    assert "the results do not fit together" in said(capsys, "bench", "report", folder)


def test_timings_may_say_anything(tmp_path):
    folder = write(tmp_path / "run", manifest_of("ruler"), ALL["ruler"][1](ALL["ruler"][0]))
    (folder / TIMINGS).write_text(
        '3\n[]\n{"seconds": "x"}\n{"seconds": NaN}\n{"seconds": true}\n{"seconds": -9}\n{"seconds": 3600}\n{'
    )
    assert "1.00 h" in build(folder)


# -- check values


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"score": 0.5', '"score": 1.0', 1),
        lambda text: text.replace('"score": 0.5', '"score": 0.75', 1),
        lambda text: text.replace('"kept": 32.0', '"kept": 8.0', 1),
        lambda text: text.replace('"method": "restkv"', '"method": "snapkv@official"', 1),
        lambda text: text.replace("aware/niah", "aware/n1ah", 1),
    ],
)
def test_a_result_that_was_changed_is_refused_by_name(edit, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert "0.750" in markdown(folder)
    text = (folder / SAMPLES).read_text()
    (folder / SAMPLES).write_text(edit(text))
    assert (folder / SAMPLES).read_text() != text
    for command in (["bench", "report", folder], ["bench", "report", folder, "--json"]):
        assert "was changed after it was written" in said(capsys, *command)
    with pytest.raises(RunError, match=r"line \d+, the result '.*', was changed"):
        filled(folder)


def test_results_of_another_run_and_of_nobody_are_refused(whole, tmp_path):
    mine, other = shutil.copytree(whole, tmp_path / "mine"), tmp_path / "other"
    arguments, make = ALL["ruler"]
    with open_run(other, "ruler", {**arguments, "seed": 7}, {}) as run:
        for row in make(arguments)[:3]:
            run.add(row["key"], {name: value for name, value in row.items() if name != "key"})
    lines_of = (mine / SAMPLES).read_text().splitlines(keepends=True)
    foreign = (other / SAMPLES).read_text().splitlines(keepends=True)
    (mine / SAMPLES).write_text("".join([lines_of[0], foreign[1], *lines_of[2:]]))
    with pytest.raises(RunError, match=r"line 2, .* or is another run's"):
        read_run(mine)
    row = json.loads(lines_of[1])
    del row["check"]
    (mine / SAMPLES).write_text("".join([lines_of[0], json.dumps(row) + "\n", *lines_of[2:]]))
    with pytest.raises(RunError, match="line 2 has no check value, so no run wrote it"):
        read_run(mine)
    (mine / SAMPLES).write_text("".join(lines_of[:1] + lines_of[2:]))  # a line that is gone is made again
    filled_again = {row["key"] for row in read_rows(mine)}
    assert len(filled_again) == len(lines_of) - 1


def test_a_run_that_grows_keeps_its_check_values(tmp_path):
    arguments, _ = ALL["ruler"]
    with open_run(tmp_path, "ruler", arguments, {}, may_grow="samples") as run:
        run.add("a", {"score": 0.5})
    with open_run(tmp_path, "ruler", {**arguments, "samples": 9}, {}, may_grow="samples") as run:
        run.add("b", {"score": 0.25})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_folders_from_before_are_read_with_a_note(whole, tmp_path, capsys):
    folder = write(tmp_path / "run", manifest_of("ruler"), ALL["ruler"][1](ALL["ruler"][0]))
    assert main(["bench", "report", str(folder)]) == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("restkv: note: ") and "made before results had check values" in note
    assert main(["bench", "report", str(shutil.copytree(whole, tmp_path / "new"))]) == 0
    assert capsys.readouterr().err == ""


# -- places


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file of the folder was; without a name, where the folder was."""

    def change(folder: Path) -> None:
        path = folder / name
        path.unlink() if name else shutil.rmtree(folder)
        make(path)

    return change


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "cannot be read (No such file or directory)"),
    "a file": (instead("", lambda path: path.write_text("x")), "cannot be read (Not a directory)"),
    "a manifest that is a folder": (
        instead(MANIFEST, Path.mkdir),
        "it is no regular file",
    ),
    "a manifest that is a pipe": (
        instead(MANIFEST, os.mkfifo),
        "it is no regular file",
    ),
    "results that are a pipe": (instead(SAMPLES, os.mkfifo), "it is no regular file"),
    "results that are endless": (
        instead(SAMPLES, lambda path: path.symlink_to("/dev/zero")),
        "no regular file",
    ),
    "no results": (lambda folder: (folder / SAMPLES).unlink(), "samples.jsonl: cannot be read (No such file"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "not a manifest"),
    "deep JSON": (lambda folder: (folder / MANIFEST).write_text("[" * 99999), "not a manifest"),
    "a manifest of no text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not a manifest"),
}


@pytest.mark.parametrize(("change", "words"), PLACES.values(), ids=PLACES)
def test_a_folder_that_is_none_is_one_line(change, words, tmp_path, capsys):
    folder = write(tmp_path / "run", manifest_of("ruler"), ALL["ruler"][1](ALL["ruler"][0]))
    change(folder)
    assert words in said(capsys, "bench", "report", folder)


@pytest.mark.parametrize("name", [SAMPLES, TIMINGS])
def test_a_run_writes_into_files_only(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match="it is no regular file"):
        filled(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match="Is a directory"):
        filled(tmp_path)
    with pytest.raises(RunError, match="it is a file"):
        filled(wrote(tmp_path / "file"))


def wrote(path: Path) -> Path:
    path.write_text("x")
    return path


def test_foreign_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with open_run(tmp_path, "ruler", ALL["ruler"][0], {}) as run:
        run.add("a", {"score": 0.5})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", MANIFEST, SAMPLES, TIMINGS}


def test_a_full_disk_is_named_and_costs_only_the_line_that_does_not_fit(tmp_path, monkeypatch):
    with open_run(tmp_path, "ruler", ALL["ruler"][0], {}) as run:
        run.add("a", {"score": 0.5})
        before = (tmp_path / SAMPLES).read_bytes()

        def full_disk(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(lines.os, "fsync", full_disk)
        with pytest.raises(RunError) as error:
            run.add("b", {"score": 0.25})
        monkeypatch.undo()
    text = str(error.value)
    assert text.startswith(
        f"{tmp_path / SAMPLES}: cannot be written (No space left on device); the disk of {tmp_path} has "
    )
    assert text.endswith("MB left; free some, or rerun to go on")
    assert (tmp_path / SAMPLES).read_bytes() == before
    with open_run(tmp_path, "ruler", ALL["ruler"][0], {}) as run:
        assert run.done == {"a"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "half \ud800"])
def test_what_cannot_be_written_down_is_no_result(value, tmp_path):
    refused = pytest.raises(RunError, match="the result 'a' has score that cannot be written down")
    with open_run(tmp_path, "ruler", ALL["ruler"][0], {}) as run, refused:
        run.add("a", {"score": value, "kept": 3})
    assert read_rows(tmp_path) == []


def test_a_checkpoint_with_another_tokenizer_is_another_checkpoint(tmp_path):
    """The same weights under another template or other merges answer other prompts."""
    arguments, _ = ALL["ruler"]
    with open_run(tmp_path, "ruler", {**arguments, "tokenizer": "0"}, {}):
        pass
    with (
        pytest.raises(RunError, match='tokenizer "0", this one has "1"'),
        open_run(tmp_path, "ruler", {**arguments, "tokenizer": "1"}, {}),
    ):
        pass


def test_resuming_with_hostile_manifests_is_one_line(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    changes: list[dict[str, Any]] = [
        {"arguments": []},
        {"methods": {"full": {"policy": 3}}},
        {"versions": [1]},
        {"check": 3},
    ]
    for change in changes:
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(RunError, match="not as a bench writes it"):
            filled(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "arguments": {**manifest["arguments"], "samples": "4"}}))
    with pytest.raises(RunError, match='holds a run with samples "4"'):
        filled(tmp_path)


def test_names_are_no_formulas_and_maps_have_an_end(tmp_path):
    manifest = manifest_of("ruler")
    label = r"$\frac{"
    rows = ALL["ruler"][1](ALL["ruler"][0])
    text = json.dumps([manifest, rows]).replace('"restkv"', json.dumps(label))
    manifest, rows = json.loads(text)
    manifest["versions"] = {"restkv": "0"}
    page = build(write(tmp_path / "run", manifest, rows))
    assert "</html>" in page
    with pytest.raises(OutputError, match="a map of 40000 cells cannot be drawn"):
        heat_maps([Grid("a", ["x"] * 200, ["y"] * 200, [[0.0] * 200] * 200)], "r", "c", "v")

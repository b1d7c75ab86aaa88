"""Folders of results that were edited, mixed up or made by something else: a page, or one line that says what and where."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.report.kinds import read_run
from bench.report.page import build, markdown
from bench.runs.folder import SAMPLES, TIMINGS, RunError, open_run, read_rows
from make.effort import many
from make.hostile import alter_remarks
from make.result_folders import ALL, filled, manifest_of, said, write
from make.result_rows import FIDELITY
from restkv.cli import main
from restkv.errors import RestKVError

# -- altered anyhow


@pytest.mark.parametrize("kind", ALL)
def test_an_unaltered_folder_has_tables_and_a_page(kind, tmp_path):
    folder = write(tmp_path / "run", manifest_of(kind), ALL[kind][1](ALL[kind][0]))
    assert "|" in markdown(folder)
    if kind in ("smoothing", "longbench"):
        assert "<table" in build(folder)


@settings(max_examples=many(120, 2), deadline=None, suppress_health_check=list(HealthCheck))
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


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
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
        ("longbench", {"asked": 17}, "asked is 17, which is not among the run's budgets"),
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

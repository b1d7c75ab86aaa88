"""Folders in which something else lies than a run left there, disks that are full, and runs that go on in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.report.figures import Grid, heat_maps
from bench.report.page import build
from bench.runs import lines
from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, RunError, open_run, read_rows
from make.result_folders import ALL, filled, manifest_of, said, write
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL
from restkv.errors import OutputError

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
    """The same weights under another template or other tokens answer other prompts."""
    names = set()
    for name in ("same", "template", "ids"):
        folder = shutil.copytree(RECALL, tmp_path / name)
        if name == "template":
            (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
        if name == "ids":
            content = json.loads((folder / "tokenizer.json").read_text())
            vocab = content["model"]["vocab"]
            vocab["ĠOtto"], vocab["e"] = vocab["e"], vocab["ĠOtto"]
            (folder / "tokenizer.json").write_text(json.dumps(content))
        names.add(Tokenizer.from_folder(folder).digest)
    assert len(names) == 3 and Tokenizer.from_folder(RECALL).digest in names
    tmp_path /= "run"
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

"""Folders of real models out of packages: tiny wheels here, and a stand-in for the conversion. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest

from bench.models import MODELS, ModelError, folder, listed, making, packages
from bench.models.__main__ import main
from bench.models.folders import RECORD
from bench.models.listed import Member, Model
from restkv.errors import OutputError

WEIGHTS = b"GGUF" + bytes(range(256)) * 40
TINY = Model(
    "tiny",
    "a model of ten kilobytes",
    "Apache-2.0",
    hashlib.sha256(WEIGHTS).hexdigest(),
    (Member("tiny-part1==1.0", "tiny_part1/data.part00"), Member("tiny-part2==1.0", "tiny_part2/data.part01")),
    (Member("tiny==1.0", "tiny/NOTICE.md"),),
)
WHOLE = ["NOTICE.md", "config.json", RECORD, "model.safetensors"]


@dataclass
class Index:
    """A package index: requirement -> the files of its wheel. It counts what is asked of it."""

    wheels: dict[str, dict[str, bytes]]
    asked: list[str] = field(default_factory=list)
    converted: int = 0

    def download(self, requirement: str, into: Path) -> Path:
        self.asked.append(requirement)
        wheel = into / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in self.wheels[requirement].items():
                file.writestr(name, content)
        return wheel

    def convert(self, model: Model, gguf: Path, out: Path) -> None:
        self.converted += 1
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """An index with TINY, which the command lists, a conversion that copies, and an empty cache."""
    halves = {"tiny-part1==1.0": {"tiny_part1/data.part00": WEIGHTS[:5000], "tiny_part1/other": b"not wanted"}}
    halves["tiny-part2==1.0"] = {"tiny_part2/data.part01": WEIGHTS[5000:]}
    index = Index({**halves, "tiny==1.0": {"tiny/NOTICE.md": b"terms"}})
    monkeypatch.setattr(packages, "download", index.download)
    monkeypatch.setattr(making, "convert", index.convert)
    monkeypatch.setattr(making, "NEEDED", ())
    monkeypatch.setattr(listed, "MODELS", {"tiny": TINY})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return index


def cache(tmp_path: Path) -> Path:
    return tmp_path / "restkv" / "models"


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_folder_is_made_once_and_found_again(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder("tiny") is None
    place = cache(tmp_path) / "tiny"
    assert main(["tiny"]) == 0
    assert capsys.readouterr().out == f"{place}\n"
    assert names(place) == sorted(WHOLE) and names(cache(tmp_path)) == ["tiny"]
    assert (place / "model.safetensors").read_bytes() == WEIGHTS and (place / "NOTICE.md").read_bytes() == b"terms"
    assert index.asked == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny==1.0"] and index.converted == 1
    assert main(["tiny"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{place}\n", "") and len(index.asked) == 3 and index.converted == 1
    assert folder("tiny") == place


def damage_file(place: Path) -> None:
    content = bytearray((place / "model.safetensors").read_bytes())
    content[77] ^= 1
    (place / "model.safetensors").write_bytes(content)


def cut_file(place: Path) -> None:
    (place / "model.safetensors").write_bytes(WEIGHTS[:-1])


def lose_file(place: Path) -> None:
    (place / "config.json").unlink()


def lose_record(place: Path) -> None:
    (place / RECORD).unlink()


def break_record(place: Path) -> None:
    (place / RECORD).write_text('{"gguf": [1', "utf-8")


def empty_record(place: Path) -> None:
    (place / RECORD).write_text('{"files": {"config.json": 3}}', "utf-8")


def be_older(place: Path) -> None:
    record = json.loads((place / RECORD).read_text("utf-8"))
    (place / RECORD).write_text(json.dumps({**record, "gguf": "0" * 64}), "utf-8")


DAMAGES = [damage_file, cut_file, lose_file, lose_record, break_record, empty_record, be_older]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again(index: Index, damage, tmp_path: Path) -> None:
    place = making.make(TINY)
    before = {name: (place / name).read_bytes() for name in WHOLE}
    damage(place)
    assert (
        folder("tiny") is None or damage is damage_file
    )  # the one whose sizes are right: only the command reads it all
    assert making.make(TINY) == place
    assert {name: (place / name).read_bytes() for name in WHOLE} == before and index.converted == 2
    assert names(cache(tmp_path)) == ["tiny"]


def test_weights_that_are_not_the_ones_we_know_are_refused(index: Index, tmp_path: Path) -> None:
    index.wheels["tiny-part2==1.0"]["tiny_part2/data.part01"] = WEIGHTS[5000:-1] + b"!"
    with pytest.raises(ModelError, match=f"tiny-part1==1.0, tiny-part2==1.0 have SHA-256 .*, not {TINY.sha256} as in"):
        making.make(TINY)
    assert names(cache(tmp_path)) == [] and index.converted == 0


def test_a_package_without_the_file_and_a_broken_wheel_are_one_line_each(
    index: Index, tmp_path: Path, monkeypatch
) -> None:
    index.wheels["tiny-part2==1.0"] = {"elsewhere": b""}
    with pytest.raises(ModelError, match=r"^tiny-part2==1\.0: .*\.whl holds no tiny_part2/data\.part01; "):
        making.make(TINY)

    def cut(requirement: str, into: Path) -> Path:
        (into / "a.whl").write_bytes(b"PK\x03\x04 and no more")
        return into / "a.whl"

    monkeypatch.setattr(packages, "download", cut)
    with pytest.raises(ModelError, match=r"^tiny-part1==1\.0: a\.whl is a broken file"):
        making.make(TINY)
    assert names(cache(tmp_path)) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("tiny: cannot be converted (no)")])
def test_what_is_broken_off_leaves_nothing_and_the_old_folder_stays(
    index: Index, error, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = making.make(TINY)
    damage_file(place)

    def half(model: Model, gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(making, "convert", half)
    assert main(["tiny"]) == (2 if isinstance(error, ModelError) else 130)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("bench.models: ")
    assert names(cache(tmp_path)) == ["tiny"] and names(place) == sorted(WHOLE)


def test_what_a_killed_process_has_left_is_removed(index: Index, tmp_path: Path) -> None:
    for name in (".tiny-abc", ".other-abc"):
        (cache(tmp_path) / name / "new").mkdir(parents=True)
    making.make(TINY)
    assert names(cache(tmp_path)) == [".other-abc", "tiny"]


def test_into_another_folder_and_over_nothing_of_others(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny", "--into", str(tmp_path / "a" / "b")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a/b/tiny\n" and not cache(tmp_path).exists()
    damage_file(tmp_path / "a/b/tiny")
    making.make(TINY, tmp_path / "a/b")
    assert (tmp_path / "a/b/tiny/model.safetensors").read_bytes() == WEIGHTS
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("years of work")
    assert main(["tiny", "--into", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"bench.models: error: {tmp_path}/tiny: is there and was not made by bench.models (it has no {RECORD}); "
        "give another --into"
    ]
    assert names(tmp_path / "tiny") == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_one_line(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/tiny: cannot be written \((Not a directory|File exists)\)"):
        making.make(TINY, tmp_path / "file")


def test_an_unknown_name_is_found_before_the_first_download(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "tinny"]) == 2
    expected = "bench.models: error: 'tinny': no such model in bench/models/models.json; choose from tiny\n"
    assert capsys.readouterr().err == expected and index.asked == []
    with pytest.raises(ModelError, match="'tinny': no such model"):
        folder("tinny")


def test_what_is_not_installed_is_named_before_the_first_download(index: Index, monkeypatch) -> None:
    monkeypatch.setattr(making, "NEEDED", ("json", "no_such_gguf"))
    with pytest.raises(
        ModelError, match=r"^making tiny needs no_such_gguf, not installed here; pip install 'restkv\[models\]'$"
    ):
        making.make(TINY)
    assert index.asked == []


def ends_with(code: int, stderr: str):
    def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


OFFLINE = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(1)'\nERROR: No matching\n"
ABSENT = "ERROR: Could not find\nERROR: No matching distribution found for a==1\n"


@pytest.mark.parametrize(
    "stderr, message",
    [
        (OFFLINE, "a==1: pip reaches no package index; run it again where there is a network"),
        (
            ABSENT,
            r"a==1: pip could not download it \(No matching distribution found for a==1\); see whether the package",
        ),
        ("", r"a==1: pip could not download it \(it said nothing\)"),
    ],
)
def test_why_pip_could_not(stderr: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", ends_with(1, stderr))
    with pytest.raises(ModelError, match=message):
        packages.download("a==1", tmp_path)


def test_pip_without_a_network(tmp_path: Path, monkeypatch) -> None:
    """The real pip, which is told of an index where nobody listens and of no other."""
    # Not by an import, nor by looking for one: either ends setuptools' distutils in this process, which inductor needs.
    if not any(metadata.distributions(name="pip")):
        pytest.skip("there is no pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(packages, "PIP", [*packages.PIP, "--retries", "1"])
    with pytest.raises(ModelError, match="pip reaches no package index"):
        packages.download("no-such-package-of-restkv==1", tmp_path)


@pytest.mark.parametrize(
    "code, stderr, message",
    [
        (1, "Traceback\nImportError: gguf is too old\n", r"tiny: cannot be converted \(ImportError: gguf is too old\)"),
        (1, "", r"cannot be converted \(exit code 1\)"),
        (-9, "", "tiny: converting was ended by signal 9; it needs up to 6 GB of memory"),
    ],
)
def test_why_a_conversion_failed(code: int, stderr: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", ends_with(code, stderr))
    with pytest.raises(ModelError, match=message):
        making.convert(TINY, tmp_path / "a.gguf", tmp_path / "out")


def test_two_processes_make_it_once(index: Index, tmp_path: Path) -> None:
    """The second finds, once it is alone, what the first has made."""
    elsewhere = making.make(TINY, tmp_path / "elsewhere")
    (tmp_path / "b").mkdir()
    holder = """
import fcntl, os, shutil, sys, time
number = os.open(sys.argv[2], os.O_RDONLY)
fcntl.flock(number, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(0.5)
shutil.copytree(sys.argv[1], sys.argv[2] + "/tiny")
"""
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(elsewhere), str(tmp_path / "b")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    said: list[str] = []
    place = making.make(TINY, tmp_path / "b", said.append)
    assert said == [f"{tmp_path}/b: waiting for another process that makes models there"]
    assert names(place) == sorted(WHOLE) and index.converted == 1 and other.wait() == 0
    other.stdout.close()


def test_the_list_that_ships() -> None:
    """Versions and digests are pinned: what is downloaded later is what was looked at, or it is refused."""
    assert list(MODELS) == ["smollm2", "gemma3-270m", "qwen2.5-0.5b"]
    for model in MODELS.values():
        assert len(model.sha256) == 64 and int(model.sha256, 16) and model.licence and model.parts
        assert all(member.requirement.count("==") == 1 for member in (*model.parts, *model.notices))

"""Commands and policies of other packages, broken in every way: each costs a note, and everything else goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from restkv.cli import app as cli
from restkv.cli import main
from restkv.errors import PolicyError
from restkv.policies import get_policy, known_policies

GOOD = "def run(word: str = 'x'):\n    print('ran', word)\n"
PANIC = "class Panic(BaseException): pass\nraise Panic('a panic\\nof two lines')"
PART = "from restkv.policies import SnapKV, Policy\nfrom dataclasses import dataclass\n"
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(package, group, {name: place}, source): a package as pip would leave it, for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before, groups = set(sys.modules), list(cli.app.registered_groups)
    commands = list(cli.app.registered_commands)

    def add(package: str, group: str, points: dict[str, str], source: str = "", raw: bytes | None = None) -> Path:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {place}" for name, place in points.items())
        (info / "entry_points.txt").write_bytes(raw or f"[{group}]\n{lines}\n".encode())
        (tmp_path / f"{package}.py").write_text(source)
        return info

    cli._command.cache_clear()
    yield add
    cli._command.cache_clear()
    cli.app.registered_groups[:], cli.app.registered_commands[:] = groups, commands
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command says on stderr while it does its own work."""
    assert main(["--version"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("restkv ")
    assert {"bench", "demo", "generate", "methods"} <= set(cli._command().commands)
    return err.splitlines()


@pytest.mark.parametrize(
    ("points", "source", "words"),
    [
        ({"mine": "other:run"}, "raise SystemExit(3)", "command 'mine' (other:run) cannot be used: SystemExit: 3"),
        ({"mine": "other:run"}, "import sys; sys.exit('bye')", "SystemExit: bye"),
        ({"mine": "other:run"}, PANIC, "Panic: a panic of two lines"),
        ({"mine": "other:run"}, "raise RecursionError", "RecursionError"),
        ({"mine": "other:run"}, "def run(:", "SyntaxError"),
        ({"mine": "other:run"}, "def run(thing: int | str | bytes): ...", "command 'mine' (other:run) cannot be used"),
        ({"mine": "other:run"}, "def run(thing: 'Nowhere'): ...", "command 'mine' (other:run) cannot be used"),
        (
            {"mine": "other:run"},
            "import typer\nrun = typer.Typer()\n@run.command()\ndef a(x: list[list[int]]): ...\n@run.command()\ndef b(): ...",
            "command 'mine' (other:run) cannot be used",
        ),
        ({"mine": "other:run"}, "run = 3", "command 'mine' (other:run) cannot be used"),
        ({"mine": "other:run.x"}, GOOD, "AttributeError"),
        ({"mine": "not a place"}, GOOD, "command 'mine' (not a place) cannot be used"),
        ({"generate": "other:run"}, GOOD, "would take the place of a command of restkv's"),
        ({"bench": "other:run"}, GOOD, "would take the place of a command of restkv's"),
        ({"--version": "other:run"}, GOOD, "its name is none that can be typed"),
        ({"two words": "other:run"}, GOOD, "its name is none that can be typed"),
    ],
)
def test_a_command_that_cannot_be_used_costs_a_note(
    install: Install, capsys: pytest.CaptureFixture[str], points: dict[str, str], source: str, words: str
) -> None:
    install("other", "restkv.commands", points, source)
    (line,) = notes(capsys)
    assert line.startswith("restkv: note: command ") and words in line and line.isprintable()
    assert cli._command().commands["generate"].callback.__module__.startswith("restkv.cli")


def test_two_packages_of_one_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("one", "restkv.commands", {"mine": "one:run"}, GOOD)
    install("two", "restkv.commands", {"mine": "two:run"}, GOOD)
    (line,) = notes(capsys)
    assert "registered by one:run of the package one and two:run of the package two; uninstall all but one" in line


@pytest.mark.parametrize(
    "raw", [b"[restkv.commands]\nmine = \xff\n", b"no section\n= 3\n", b"[restkv.commands]\nnothing here\n"]
)
def test_a_package_whose_entry_points_cannot_be_read_hides_no_other(
    install: Install, capsys: pytest.CaptureFixture[str], raw: bytes
) -> None:
    install("other", "restkv.commands", {"mine": "other:run"}, GOOD)
    install("broken", "", {}, raw=raw)
    assert all("broken" in line or "mine" in line for line in notes(capsys))
    assert "snapkv" in known_policies()


def test_a_command_that_can_be_used_is(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("other", "restkv.commands", {"mine": "other:run"}, GOOD)
    assert main(["mine", "--word", "y"]) == 0
    assert capsys.readouterr() == ("ran y\n", "")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise SystemExit(3)", "cannot be imported (SystemExit: 3)"),
        (PANIC, "cannot be imported (Panic: a panic of two lines)"),
        (PART + "class Mine(Policy):\n    name = 'mine'", "has no importance"),
        (PART + "class Mine(SnapKV):\n    name = 'mine'\n    PRESETS = 3", "has PRESETS that do not map"),
        (PART + "class Mine(SnapKV):\n    name = 'mine'\n    reductions = 'mean'", "has reductions 'mean'"),
        (
            PART
            + "@dataclass(frozen=True)\nclass Mine(SnapKV):\n    name = 'mine'\n    def __post_init__(self): 1 / 0",
            "mine: cannot be made of these options (ZeroDivisionError: division by zero)",
        ),
    ],
)
def test_a_policy_that_cannot_be_used_is_named_when_it_is_asked_for(
    install: Install, capsys: pytest.CaptureFixture[str], source: str, words: str
) -> None:
    install("other", "restkv.policies", {"mine": "other:Mine"}, source)
    with pytest.raises(PolicyError) as error:
        get_policy("mine", budget=64)
    assert words in str(error.value) and str(error.value).isprintable()
    assert main(["methods"]) == 0
    assert "snapkv" in capsys.readouterr().out

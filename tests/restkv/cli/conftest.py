"""Fixtures of the tests of commands: run one in this process, or in one of its own, on a checkpoint that never stops talking."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from make.commands import COMMAND, Ran
from make.rambler import save_rambler, to_rambler
from make.terminals import CLIPBOARD
from restkv.cli import main


@pytest.fixture
def run(rambler: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """run(*arguments, stdin=text): one command line in this process, to the rambler unless it names a model."""

    def call(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(to_rambler(rambler, arguments))
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def copy(rambler: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(rambler, tmp_path / "model"))


@pytest.fixture
def start(rambler: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """A process of its own, with Ctrl-C as a terminal gives it: a shell's background jobs, such as CI's, ignore it."""

    def call(*arguments: str, **streams: int) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [*COMMAND, *to_rambler(rambler, arguments)]
        return subprocess.Popen(command, preexec_fn=listen, **streams)  # type: ignore[call-overload]

    return call


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rambler that speaks in control sequences: each space of its words is one, of several pieces of text."""
    folder = tmp_path_factory.mktemp("hostile")
    save_rambler(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": f"{CLIPBOARD}\r\x9b31m\u202e"}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], replace]}
    path.write_text(json.dumps(tokenizer))
    return folder

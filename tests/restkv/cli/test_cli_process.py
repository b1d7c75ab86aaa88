"""The command line as a process of its own: pipes, signals, terminals, time."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from make.commands import COMMAND, LONG, STORY
from make.rambler import to_rambler

# -- a process of its own: pipes, signals, terminals, time


def test_text_comes_before_the_end_and_ctrl_c_is_quiet(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start(*LONG) as process:
        assert process.stdout is not None and process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.decode()) == (130, "")


def test_a_reader_that_leaves_ends_it_quietly(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start(*LONG) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert (process.wait(timeout=60), err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("generate", "-p", STORY, "-n", "4"), ("methods",)])
def test_full_disk_is_one_line(start: Callable[..., subprocess.Popen[bytes]], arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full, start(*arguments, stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=60)
    (line,) = err.decode().splitlines()
    assert process.returncode == 2 and "stdout: cannot be written (No space left on device)" in line


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "words"),
    [
        (("generate", "-n", "3"), "<&-", 2, "prompt is empty"),
        (("chat", "-n", "3"), "<&-", 0, ""),
        (("generate", "-n", "3", "-p", STORY), ">&-", 0, "first token after"),
        (("chat", "-n", "3"), ">&-", 0, ""),
        (("generate", "-n", "3", "-p", STORY), "2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_an_empty_one(
    rambler: Path, arguments: tuple[str, ...], closed: str, code: int, words: str
) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *to_rambler(rambler, arguments)]
    ran = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60)
    assert ran.returncode == code and words in ran.stderr and "Traceback" not in ran.stderr
    assert bool(ran.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_stream_that_cannot_be_read_is_named(rambler: Path, tmp_path: Path, command: str) -> None:
    with open(tmp_path / "written", "wb") as stream:
        ran = subprocess.run(
            [*COMMAND, *to_rambler(rambler, (command,))], stdin=stream, capture_output=True, timeout=60
        )
    (line,) = ran.stderr.decode().splitlines()
    assert ran.returncode == 2 and ran.stdout == b""
    assert line.endswith("stdin: cannot be read (Bad file descriptor); give it a file or a pipe to read from")


def test_progress_shows_on_a_terminal_only(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    bar, arguments = b"reading the prompt", ("generate", "-p", STORY, "-n", "2")
    with start(*arguments) as process:
        assert bar not in process.communicate(timeout=60)[1]
    master, slave = pty.openpty()
    with start(*arguments, stderr=slave) as process, open(master, "rb", buffering=0) as terminal:
        os.close(slave)
        shown = b""
        while piece := read(terminal):
            shown += piece
        process.communicate(timeout=60)
    assert bar in shown and b"entries per KV head" in shown


def read(terminal: io.FileIO) -> bytes:
    """What has come; nothing when the other end is closed, which Linux reports as an error."""
    try:
        return terminal.read(4096) or b""
    except OSError:
        return b""


def test_generating_on_a_cpu_loads_neither_the_compiler_nor_what_only_benches_use(rambler: Path) -> None:
    """Half of the seconds before the first token would be torch._dynamo and what it brings."""
    arguments = to_rambler(rambler, ("generate", "-p", STORY, "-n", "2", "--device", "cpu"))
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.nn.attention.flex_attention",
        "transformers",
        "matplotlib",
    )
    script = f"import sys; from restkv.cli import main; code = main({arguments!r}); print(code, set({heavy}) & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("\n0 set()\n")

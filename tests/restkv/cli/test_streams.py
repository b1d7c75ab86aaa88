"""Streams of a process of its own: terminals, readers that have gone, full disks, Ctrl-C in the middle of an import."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest

from bench.speed.workers import Process
from make.commands import COMMAND
from make.places import ROOT
from make.rambler import to_rambler
from make.terminals import Terminal, clean
from restkv.cli import main
from restkv.cli.terminal import status

# -- a process of its own


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    streams: dict[str, object] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*COMMAND, *arguments], preexec_fn=listen, **(streams | options))  # type: ignore[call-overload]


def test_a_real_terminal_sees_the_phases_and_no_control_sequence_of_the_model(hostile: Path) -> None:
    master, slave = pty.openpty()
    with start(
        *("generate", str(hostile), "-p", "Lily " * 40, "-n", "3"),
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        os.close(slave)
        seen = b"".join(iter(partial(read, master), b""))
        assert process.wait(60) == 0
    os.close(master)
    text = seen.decode().replace("\r\n", "\n")
    passing = re.findall(r"\r\x1b\[K([^\r\n]*?)(?=\r\x1b\[K)", text)
    assert [phase.split(":")[0] for phase in passing if phase][:1] == ["importing torch"]
    assert {phase.split(":")[0] for phase in passing} >= {
        "importing torch",
        "loading the weights",
        "reading the prompt",
    }
    rest = re.sub(r"(\r\x1b\[K[^\r\n]*)*\r\x1b\[K", "", text)
    assert clean(rest) and rest.startswith("\\x1b]52;c;aGk=\\x07\\r") and "restkv: kept" in rest


def read(terminal: int) -> bytes:
    """What has come; nothing when the other end is closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_nothing_passes_where_no_terminal_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, term in ((io.StringIO(), "xterm"), (Terminal(), "dumb")):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", term)
        status.show("loading")
        assert status.progress("loading") is None
        status.clear()
        assert stream.getvalue() == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["methods"]])
def test_a_reader_that_has_gone_is_141_without_a_word(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start(*arguments, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_full_disk_is_said_to_be_under_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full, start(*arguments, stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"restkv: error: stdout: cannot be written.*No space left on device.*\n", err.decode())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_nobody_can_read_on_stderr_changes_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        for stream in (full.fileno(), writer):
            with start("generate", "-p", "a", "--prompt-file", "b", stderr=stream) as process:
                assert (process.communicate(timeout=60)[0], process.returncode) == (b"", 2)
    os.close(writer)


def test_an_answer_comes_though_its_summary_cannot(rambler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Full())
    assert main(["generate", str(rambler), "-p", "Lily", "-n", "2"]) == 0
    assert out.getvalue().strip()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"COLUMNS": "0"},
        {"COLUMNS": "1"},
        {"COLUMNS": "1000000000"},
        {"COLUMNS": "²"},
        {"COLUMNS": "-1", "LINES": "x"},
        {"TERMINAL_WIDTH": "wide"},
        {"TERM": "dumb", "NO_COLOR": "1"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_help_in_any_environment(environment: dict[str, str]) -> None:
    only = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    with start("generate", "--help", env=only | environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"") and b"--max-new-tokens" in out and len(out) < 10**6


def test_tables_where_ascii_is_all_there_is(rambler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, raw = tmp_path / "modèle", io.BytesIO()
    copytree(rambler, folder)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", errors="strict"))
    assert main(["inspect", str(folder)]) == 0
    assert rb"mod\xe8le" in raw.getvalue() and b"| layers" in raw.getvalue()


@pytest.fixture(params=["typer", "torch"])
def slow_import(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """An import that takes long and swallows whatever is raised in it; the file that says that it has begun, the environment."""
    begun, folder = tmp_path / "begun", tmp_path / "packages"
    folder.mkdir()
    source = f"import time\ntry:\n    open({str(begun)!r}, 'w')\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)\n"
    (folder / f"{request.param}.py").write_text(source)
    yield begun, os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_ctrl_c_in_the_middle_of_an_import_is_quiet(slow_import: tuple[Path, dict[str, str]]) -> None:
    begun, environment = slow_import
    with start("generate", "-p", "a", env=environment) as process:
        for _ in range(1000):
            if begun.exists():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_the_command_runs_in_any_thread_and_leaves_ctrl_c_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    handler = signal.getsignal(signal.SIGINT)
    assert [*codes, main(["--version"])] == [0, 0]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_bench_that_is_broken_off_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    """Ctrl-C comes while a worker works; it is not the worker's to hear."""
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    process = Process("slow", "sleeper", [], environment={"PYTHONPATH": str(tmp_path)})
    assert os.getpgid(process._process.pid) != os.getpgid(0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            process.ask("prefill")
    finally:
        signal.signal(signal.SIGALRM, previous)
    began = time.monotonic()
    process.close()
    assert time.monotonic() - began < 10


# -- streams that do not block


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("generate", "-n", "3"), b"Once upon a time"), (("chat", "-n", "3"), b"Once upon a time\n/stats\n")],
)
def test_input_that_does_not_block_is_waited_for(rambler: Path, arguments: tuple[str, ...], text: bytes) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with start(*to_rambler(rambler, arguments), stdin=reader) as process:
        os.close(reader)
        for _ in range(100):  # until somebody has begun to read, or has gone
            time.sleep(0.1)
            if process.poll() is not None or waits_to_read(process.pid):
                break
        for part in (text[:9], text[9:]):
            os.write(writer, part)
            time.sleep(0.3)
        os.close(writer)
        assert process.stdout is not None and process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read().decode()
        assert process.wait(60) == 0, err
    assert out.strip() and "kept" in err and "error" not in err


def waits_to_read(number: int) -> bool:
    """Whether a process is blocked in reading its standard input (system call 0 of x86-64; elsewhere nobody can tell)."""
    try:
        return Path(f"/proc/{number}/syscall").read_text().startswith("0 0x0 ")
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_does_not_block_is_not_cut_short(tmp_path: Path, stream: str) -> None:
    """A pipe that is full for a while: the whole text arrives, and the command ends as always."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    full = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    os.write(writer, b"x" * full)
    arguments = ("methods",) if stream == "stdout" else ("generate", str(tmp_path / "nowhere"), "-p", "Once")
    with start(*arguments, **{stream: writer}) as process:
        os.close(writer)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(6)
        seen = b""
        while piece := os.read(reader, 1 << 16):
            seen += piece
        os.close(reader)
        code = process.wait(60)
    plain = subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
    assert (code, seen[full:]) == (plain.returncode, plain.stdout if stream == "stdout" else plain.stderr)
    assert len(seen) > full

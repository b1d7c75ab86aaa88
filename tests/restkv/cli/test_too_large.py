"""Texts without end, and memory that will not do: one line each, before the machine has to end somebody."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.published import haystack
from bench.runs import jsonl
from make.commands import COMMAND, STORY, Ran
from make.rambler import to_rambler
from restkv.cli import app, main, options, talk
from restkv.errors import PromptError

READERS = (
    "generate --prompt-file {}",
    "bench kept --prompt-file {}",
    "bench mask --prompt-file {}",
    "bench fidelity --text {}",
    "bench perplexity --data {}",
    "bench smoothing --text {}",
    "bench documents --data {}",
)


def limited(arguments: Sequence[str], memory: int, **streams: object) -> subprocess.CompletedProcess[bytes]:
    """A process that may have so many bytes of address space."""
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (memory, memory))
    command = [*COMMAND, *arguments]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, timeout=100, check=False, **streams)  # type: ignore[call-overload]


def one_line(ran: subprocess.CompletedProcess[bytes]) -> str:
    (line,) = ran.stderr.decode().splitlines()
    assert (ran.returncode, ran.stdout) == (2, b"") and line.startswith("restkv: error: "), line
    return line


@pytest.mark.parametrize("command", READERS)
def test_a_file_longer_than_any_text_is_refused_unread(run: Callable[..., Ran], tmp_path: Path, command: str) -> None:
    file = tmp_path / "large.txt"
    file.touch()
    os.truncate(file, 6 << 30)
    ran = run(*command.format(file).split())
    assert ran.code == 2 and f"{file}: has more than the 1,073,741,824 bytes that a text may have" in ran.err


@pytest.mark.parametrize("command", READERS)
def test_a_device_is_refused_unread(run: Callable[..., Ran], tmp_path: Path, command: str) -> None:
    file = tmp_path / "endless.txt"
    file.symlink_to("/dev/zero")
    ran = run(*command.format(file).split())
    assert ran.code == 2 and f"{file}: is a device, not a text; give a file or a pipe" in ran.err


def test_stdin_without_end_is_refused(rambler: Path) -> None:
    with open("/dev/zero", "rb") as zero:
        ran = limited(to_rambler(rambler, ("generate",)), 4 << 30, stdin=zero)
        assert one_line(ran).endswith("stdin: is a device, not a text; give a file or a pipe")
        ran = limited(to_rambler(rambler, ("chat",)), 4 << 30, stdin=zero)
        assert one_line(ran).endswith("stdin: a line has more than 67,108,864 characters; give it shorter lines")


def test_pipes_and_dev_stdin_are_read(rambler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(STORY,))
    writer.start()
    assert options.read_text(pipe) == STORY
    writer.join()
    monkeypatch.setattr(options, "TEXT_LIMIT", len(STORY) - 1)
    writer = threading.Thread(target=pipe.write_text, args=(STORY,))
    writer.start()
    with pytest.raises(PromptError, match="pipe: has more than the"):
        options.read_text(pipe)
    writer.join()
    command = [*COMMAND, *to_rambler(rambler, ("generate", "-n", "2", "--prompt-file", "/dev/stdin"))]
    assert subprocess.run(command, input=STORY.encode(), capture_output=True, check=True, timeout=60).stdout.strip()


def test_a_line_of_a_chat_has_a_limit(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "LONGEST_LINE", 10)
    ran = run("chat", "-n", 2, stdin="Tom is\n0123456789\nnever\n")
    assert ran.code == 2 and "a line has more than 10 characters" in ran.err and ran.out.count("\n") == 1


def test_files_of_published_benchmarks_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "essay.txt").touch()
    os.truncate(tmp_path / "essay.txt", 6 << 30)
    with pytest.raises(PromptError, match=r"essay\.txt: has more than the"):
        haystack._essays(tmp_path)
    monkeypatch.setattr(jsonl, "LONGEST_ROW", 10)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 12345}\n')
    with pytest.raises(jsonl.DataError, match="line 2 has more than 10 bytes"):
        jsonl.Rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("megabytes", [100, 640, 700, 760, 820])
def test_a_process_without_memory_says_so(rambler: Path, megabytes: int) -> None:
    """Wherever it comes to an end: in the middle of an import, of a checkpoint, of a prompt."""
    ran = limited(to_rambler(rambler, ("generate", "-p", STORY, "-n", "2")), megabytes << 20)
    if ran.returncode == -6 and b"std::bad_alloc" in ran.stderr:
        pytest.skip("torch ends the process while its libraries are loaded")
    if ran.returncode:
        line = one_line(ran)
        assert "not enough memory" in line or "free under ulimit -v" in line


def test_a_text_that_cannot_be_encoded_is_refused(rambler: Path, tmp_path: Path) -> None:
    with open(tmp_path / "long", "wb+") as text:
        text.write(b"a" * (100 << 20))
        text.seek(0)
        ran = limited(to_rambler(rambler, ("generate",)), 4 << 30, stdin=text)
    assert "not enough memory to encode a text of 104,857,600 characters" in one_line(ran)


LACKS = [
    MemoryError(),
    MemoryError("tried to allocate 8000000000 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", LACKS, ids=repr)
def test_lack_of_memory_that_reaches_the_command_line_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(app, "_run", fail)
    assert main(["methods"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("restkv: error: not enough memory") and "; ask for less (" in line and "limits" in line


@pytest.mark.parametrize("error", LACKS[:4], ids=repr)
def test_lack_of_memory_in_a_chat_is_one_line(
    error: Exception, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(talk.Talk, "_say_stats", fail)
    ran = run("chat", "-n", 2, stdin="/stats\nTom is\n")
    assert ran.code == 0 and ran.out.strip()
    assert [line[:40] for line in ran.lines()] == ["restkv: error: /stats: not enough memory"[:40]]


def test_what_is_no_lack_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(app, "_run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["methods"])

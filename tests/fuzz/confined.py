"""A piece of work in a process of its own, under limits of time and memory, and what became of it.

The process is a fork: what the tests have imported is there already, so that a case costs milliseconds, and whatever a case
does to its process (a panic, a leak, an endless loop) ends with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ANSWERED, REFUSED, FAILED = "answered", "refused in one line", "failed"
NOTE, ERROR = "restkv: note: ", "restkv: error: "
CRASHED = 70  # exit code of a case whose Python raised what nothing caught
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Limits:
    """What a case may take: seconds of the clock, and bytes of address space beyond what its process has when it is forked."""

    seconds: float = 20.0
    memory: int = 800 << 20


@dataclass(frozen=True)
class Outcome:
    """How a case ended: one of ANSWERED, REFUSED and FAILED; what it printed; why it counts as failed ("" otherwise)."""

    kind: str
    stdout: bytes
    stderr: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}\n--- stderr\n{self.stderr[-3000:]}\n--- stdout\n{self.stdout[:300]!r}"


def confined(work: Callable[[], int], stdin: bytes = b"", limits: Limits | None = None, talk: bool = False) -> Outcome:
    """Run `work`, which returns an exit code as a command does, and judge how it ended.

    A right end is exit code 0, or 2 with exactly one line of error; in both cases stderr has nothing else but notes, and no
    control character of a stranger's.

    Args:
        talk: a chat, which says what went wrong with a turn and goes on, to end with exit code 0.
    """
    limits = limits or Limits()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            _become(work, given.fileno(), out.fileno(), err.fileno(), limits)
        status = _wait(child, limits.seconds)
        stdout, stderr = _content(out.fileno()), _content(err.fileno()).decode("utf-8", "backslashreplace")
    why = _complaint(status, stderr, limits, talk)
    kind = FAILED if why else (ANSWERED if status == 0 else REFUSED)
    return Outcome(kind, stdout, stderr, why)


def _become(work: Callable[[], int], given: int, out: int, err: int, limits: Limits) -> None:
    """The child: standard streams, limits, the work, and an end that runs none of the parent's clean-up."""
    code = CRASHED
    try:
        faulthandler.disable()  # its report would go to the terminal of the tests
        os.setsid()  # so that whatever it starts can be ended with it
        for source, target in ((given, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="surrogateescape", closefd=False))
        most = _address_space() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else CRASHED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _wait(child: int, seconds: float) -> int | None:
    """Exit code, minus the signal that ended it, or None for a child that had to be killed."""
    handle = os.pidfd_open(child)
    try:
        in_time = bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)
    if not in_time:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has left behind
    return os.waitstatus_to_exitcode(status) if in_time else None


def _content(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    with os.fdopen(os.dup(number), "rb") as file:
        return file.read()


def _complaint(status: int | None, stderr: str, limits: Limits, talk: bool) -> str:
    if status is None:
        return f"still running after {limits.seconds:g} s"
    if status < 0:
        return f"ended by signal {-status}"
    if status not in (0, 2):
        return f"exit code {status}"
    lines = [line for line in stderr.split("\n") if line]
    errors = [line for line in lines if line.startswith(ERROR)]
    if found := CONTROLS.search(stderr):
        return f"{found[0]!r} reached stderr"
    if len(errors) != (status == 2) and not (talk and status == 0):
        return f"{len(errors)} lines of error with exit code {status}"
    # After an answer the summary has two lines of its own.
    others = [line for line in lines if not line.startswith((NOTE, ERROR))]
    if status == 2 and others:
        return f"beside the error stderr says {others[0]!r}"
    if any("Traceback" in line or "panicked" in line for line in others):
        return "a traceback"
    return ""

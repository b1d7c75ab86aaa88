"""A chat template's text, rendered under limits in a process of its own (modeling/text/render_child.py).

A template is a program that came with a checkpoint. jinja2's sandbox keeps it from reaching anything; it does not keep it from
computing 9 ** (9 ** 9) or a string of 10 GB. So it runs where the kernel bounds its processor time and its address space, and
where there is nothing to lose: that process gets no environment, no files, and no code of ours but render_child.py.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import TokenizerError

CHILD = Path(__file__).with_name("render_child.py")
# What one text may take: so much, and more in proportion to what the template is given (its variables as JSON, in bytes).
SECONDS = 2.0  # of processor time, and once more for every SECONDS_PER bytes
SECONDS_PER = 32 << 20
BYTES = 256 << 20  # of address space, of which python and jinja2 take 25 MB, and MEMORY_PER for every byte
MEMORY_PER = 40
CHARACTERS = 100_000  # of text, and CHARACTERS_PER for every byte
CHARACTERS_PER = 10
WALL_SECONDS = 30.0  # for an answer; only a machine that is very busy, or stops, gets there: a template cannot sleep
PIECE = 1 << 16  # bytes read at a time
PLAIN = "pass plain text instead (--no-chat, --no-template)"


@dataclass
class Child:
    """A process that knows the template, and our end of the line to it."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    owner: int  # the process that started it

    def end(self) -> int:
        """End it, and say how it ended (see subprocess.Popen.returncode); in a fork of its owner, let go of it."""
        self.channel.close()
        if os.getpid() != self.owner:
            self.process.returncode = 0  # nobody here is to wait for it
            return 0
        with contextlib.suppress(
            PermissionError
        ):  # we have become another user: it ends by itself, having nobody to answer
            self.process.kill()
        return self.process.wait()


class Renderer:
    """One template, in a process that starts when the first text is asked for and lives as long as this object.

    A process that has died is replaced. Threads take turns. A fork gets a process of its own, and so does a copy.

    Args:
        source: the template.
        place: named in errors.
    """

    def __init__(self, source: str, place: str) -> None:
        self._source, self._place = source, place
        self._lock = threading.Lock()
        self._child: Child | None = None
        _ALL.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Renderer, (self._source, self._place)

    def text(self, variables: Mapping[str, Any]) -> str:
        """The template's text for its variables, which must be what JSON can hold.

        Raises:
            TokenizerError: the template is broken, refuses the variables, or needs too much of anything.
        """
        return self._ask("text", variables)["text"]

    def names(self) -> list[str]:
        """Names that the template reads and does not define.

        Raises:
            TokenizerError: the template is broken.
        """
        return self._ask("names", {})["names"]

    def forget(self) -> None:
        """Let go of what a fork has inherited: the process answers its owner, and a thread of that one may hold the lock."""
        self._lock = threading.Lock()
        self._end()

    def _ask(self, what: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        now = datetime.datetime.now()
        given = json.dumps(variables)
        most = CHARACTERS + CHARACTERS_PER * len(given)
        limits = {
            "seconds": SECONDS * (1 + len(given) / SECONDS_PER),
            "bytes": BYTES + MEMORY_PER * len(given),
            "characters": most,
        }
        request = {
            "ask": what,
            "now": [now.year, now.month, now.day, now.hour, now.minute, now.second, now.microsecond],
            **limits,
        }
        with self._lock:
            try:
                answer = self._exchange(f"{json.dumps(request)}\n{given}\n", limits)
            except BaseException:  # Ctrl-C too: an answer that comes late would be taken for the next one
                self._end()
                raise
            if "exceeded" in answer:
                self._end()
        if "exceeded" in answer:
            raise self._refuse(_beyond(answer["exceeded"], limits))
        if "error" in answer:
            raise self._refuse(answer["error"])
        return answer

    def _exchange(self, request: str, limits: Mapping[str, float]) -> dict[str, Any]:
        """Say something to the process, which is started if there is none, and hear its answer."""
        served = self._child is not None
        if self._child is None:
            self._child = self._started()
            request = f"{json.dumps(self._source)}\n{request}"
        channel, deadline, got = self._child.channel, time.monotonic() + WALL_SECONDS, bytearray()
        most = 12 * limits["characters"] + PIECE  # a character can be 12 bytes of JSON
        try:
            channel.settimeout(WALL_SECONDS)
            channel.sendall(request.encode())
            while not got.endswith(b"\n"):
                channel.settimeout(max(0.001, deadline - time.monotonic()))
                piece = channel.recv(PIECE)
                if not piece or len(got) > most:
                    raise ConnectionError
                got += piece
        except TimeoutError:
            raise self._refuse(f"it takes longer than {WALL_SECONDS:.0f} s; mend it, or {PLAIN}") from None
        except OSError:
            code = self._child.end()
            self._end()
            if served and code != -signal.SIGPROF:  # it may have been killed since the last text: another one tells
                return self._exchange(request, limits)
            raise self._refuse(_death(code, limits)) from None
        return json.loads(got)

    def _started(self) -> Child:
        try:
            child = _start()
        except OSError as error:
            raise TokenizerError(
                f"{self._place}: the chat template cannot be rendered, as no process can be started for it ({error.strerror}); "
                f"allow one more, or {PLAIN}"
            ) from None
        self._ending = weakref.finalize(self, child.end)
        return child

    def _end(self) -> None:
        if self._child is not None:
            self._child = None
            self._ending()

    def _refuse(self, why: str) -> TokenizerError:
        return TokenizerError(f"{self._place}: the chat template failed: {why}")


def _start() -> Child:
    """A process that is to be told the template first.

    It has no environment but what an interpreter may need to find its libraries and the clock's zone, no file but its end of the
    line, no part in our process group (Ctrl-C is ours) and none in our working folder.

    Raises:
        OSError: there can be no such process.
    """
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin}
    command = [sys.executable or "python3", "-ISB", str(CHILD), *sorted(folders)]
    ours, theirs = socket.socketpair()
    try:
        try:
            process = _process(command, theirs, sys.executable)
        except (FileNotFoundError, PermissionError):  # out of reach, as when we have become another user
            process = _process(command, theirs, "/proc/self/exe")
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Child(process, ours, os.getpid())


def _process(command: list[str], line: socket.socket, program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        executable=program or None,
        stdin=line.fileno(),
        stdout=line.fileno(),
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ},
        cwd="/",
        process_group=0,
    )


def _death(code: int, limits: Mapping[str, float]) -> str:
    """Why a process has ended that should have answered."""
    if code == -signal.SIGPROF:
        return _beyond("seconds", limits)
    if code >= 0:
        return f"its process ended with exit code {code}; see whether {sys.executable} can import jinja2, or {PLAIN}"
    return f"its process was ended by signal {-code}; mend it, or {PLAIN}"


def _beyond(what: str, limits: Mapping[str, float]) -> str:
    needs = {
        "seconds": f"{limits['seconds']:.3g} s of processor time",
        "bytes": f"{limits['bytes'] / (1 << 20):,.0f} MB of memory",
        "characters": f"{limits['characters']:,} characters to say what it is given",
    }
    return f"it needs more than {needs[what]}; mend it, or {PLAIN}"


_ALL: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _forget_all() -> None:
    for renderer in list(_ALL):
        renderer.forget()


os.register_at_fork(after_in_child=_forget_all)

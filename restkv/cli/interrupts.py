"""Ctrl-C ends the command without a word, whatever it is at. Light: the first thing that the command imports."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

CODE = 130  # exit code of a process that Ctrl-C has ended


@contextmanager
def listening() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt or, within an import, ends the process.

    Libraries swallow an exception in the middle of their imports, and would go on without half of what they need. Where Ctrl-C
    is ignored, as by a shell's background jobs, or somebody else's, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # only the main thread may say what a signal does
        before = None
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def only_raise() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt everywhere: there is something that it must not end."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """End the process; Ctrl-C while the interpreter tidies up changes nothing any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if "restkv.cli.terminal" in sys.modules:
                sys.modules["restkv.cli.terminal"].status.abandon()
            os._exit(CODE)
        frame = frame.f_back
    raise KeyboardInterrupt

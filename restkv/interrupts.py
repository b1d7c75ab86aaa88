"""Ctrl-C ends the command without a word, whatever it is at. Light: the first thing that the command imports."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

CODE = 130  # exit code of a process that Ctrl-C has ended


def listen() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt or, within an import, ends the process.

    Libraries swallow an exception in the middle of their imports, and would go on without half of what they need. Where Ctrl-C
    is ignored, as by a shell's background jobs, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


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
            if "restkv.terminal" in sys.modules:
                sys.modules["restkv.terminal"].status.abandon()
            os._exit(CODE)
        frame = frame.f_back
    raise KeyboardInterrupt

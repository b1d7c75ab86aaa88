"""The `restkv` command as a process: exit codes and Ctrl-C. All else is imported when Ctrl-C is listened to."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from restkv.cli import interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv when None) and return its exit code.

    0: done. 2: a user's error, said in one line on stderr. 130: Ctrl-C. 141: whoever read stdout has gone.
    """
    try:
        with interrupts.listening():
            from restkv.cli.app import execute

            return execute(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        return interrupts.CODE
    except MemoryError:  # before anybody could say it better
        with contextlib.suppress(OSError):
            os.write(2, b"restkv: error: not enough memory to begin; free some\n")
        return 2


def run() -> NoReturn:
    """The process behind the command: `main`, and its exit code."""
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from restkv.cli import ranks

        ranks.part(code)
    interrupts.leave(code)

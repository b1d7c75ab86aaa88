"""The doors through which the command line writes: remarks on stderr, answers on stdout, and a passing line on a terminal.

What a terminal shows is escaped (modeling/shown.py); a pipe or file gets an answer's text as it is. rich has a door of its own
(console.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any, TextIO

from modeling.shown import HARMFUL, shown
from restkv.errors import OutputError

NARROWEST, WIDEST = 20, 1000  # columns that a terminal may claim to have
REFRESH = 0.1  # seconds between two states of the passing line
hushed = False  # another process speaks for this one (cli/ranks.py)


def prepare() -> None:
    """Make the standard streams and the terminal's size usable, whatever the environment says of them.

    A stream that was closed, as with `<&-`, is None: read nothing from it, and write to it in vain. One that does not block, as
    programs leave a pipe or a terminal that they share with us, is made to: it would seem to end, or cut an answer short, where
    it has to be waited for. A character that the encoding
    of a stream lacks is written as its escape. A width that is no number, or one that nobody has, is forgotten.
    """
    for number in range(3):
        with contextlib.suppress(OSError):  # closed
            os.set_blocking(number, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        size = os.environ.get(name, "")
        usable = size.isascii() and size.isdigit() and len(size) <= 4 and NARROWEST <= int(size) <= WIDEST
        if size and not usable:
            del os.environ[name]


def say(text: str, urgent: bool = False) -> None:
    """Write lines to stderr; while `hushed`, urgent ones alone. Nobody may be there to read them: that stops nothing."""
    if hushed and not urgent:
        return
    status.clear()
    try:
        print(shown(text), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def put(text: str) -> None:
    """Write to stdout at once.

    Raises:
        BrokenPipeError: whoever read it has gone. OutputError: it cannot be written, as on a full disk.
    """
    status.clear()
    with writing():
        sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def put_line(value: object) -> None:
    """`put` a value's text and a line end."""
    put(f"{value}\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of a value: what a terminal would obey, or the encoding of stdout may lack, stands as JSON's escape."""
    text = json.dumps(value, ensure_ascii="utf" not in (sys.stdout.encoding or "utf").lower(), indent=indent)
    return HARMFUL.sub(lambda found: json.dumps(found[0])[1:-1], text)


@contextmanager
def writing() -> Iterator[None]:
    """Around whatever writes to stdout: the error of a full disk says what it is about (raises OutputError)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"stdout: cannot be written ({error.strerror}); what came so far is cut short there"
        ) from None


def silence(stream: TextIO) -> None:
    """Give the interpreter somewhere to flush a stream to on its way out, when it may fail again."""
    with contextlib.suppress(OSError, ValueError):  # some streams of tests have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Status:
    """A passing line on stderr that says what takes its time; nothing where no terminal shows it. All doors clear it first."""

    def __init__(self) -> None:
        self._shown = False
        self._next = 0.0  # when progress may be drawn again

    @property
    def seen(self) -> bool:
        """Whether anybody would see it."""
        return not hushed and os.environ.get("TERM") not in ("dumb", "unknown") and sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self.seen:
            try:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or NARROWEST  # 0: it does not say
            except OSError:
                columns = NARROWEST
            self._write("\r\x1b[K" + shown(text)[: columns - 1])
            self._shown = True

    def progress(self, text: str, amount: Callable[[int], str] | None = None) -> Callable[[int, int], None] | None:
        """A callback (done, total) that shows how far something is, in per cent or by what `amount` makes of the two numbers.

        None where nobody would see it.
        """
        if not self.seen:
            return None

        def draw(done: int, total: int) -> None:
            if done >= total:
                self.clear()
            elif time.monotonic() >= self._next:
                self._next = time.monotonic() + REFRESH
                part = f"{done / total:.0%}" if amount is None else f"{amount(done)} of {amount(total)}"
                self.show(f"{text}: {part}")

        self.show(text)
        return draw

    def clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def abandon(self) -> None:
        """Leave a clean terminal in the middle of whatever writes to it."""
        if self.seen:
            with contextlib.suppress(OSError):
                os.write(2, b"\r\x1b[K\x1b[?25h")  # the cursor, which rich's bars hide

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


status = Status()


class _Announcer:
    """A finder that finds nothing: it sees that torch is about to be imported, which takes seconds, and says so."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torch":
            status.show("importing torch")
        return None


@contextmanager
def announcing() -> Iterator[None]:
    """Inside, an import of torch shows on the terminal, whichever command needs it."""
    if "torch" in sys.modules or not status.seen:
        yield
        return
    announcer: Any = _Announcer
    sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        sys.meta_path.remove(announcer)

"""Where `restkv generate` puts its answer: stdout, a pipe or a device as it is made, or a file that is replaced in the end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from modeling.shown import shown
from restkv.cli.terminal import put, status
from restkv.errors import OutputError
from restkv.files import refusal, require_writable, write_text


class Sink:
    """A place for text. A file is tested at once, and replaced as a whole in the end.

    Args:
        path: None is stdout.
    Raises:
        OutputError: the place cannot be written to, now or later.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pieces: list[str] = []
        self._special = None if path is None else _opened_special(path)
        if path is not None and self._special is None:
            require_writable(path)

    def write(self, text: str) -> None:
        status.clear()
        if self._path is None:
            put(text)
        elif self._special is None:
            self._pieces.append(text)
        else:
            text = shown(text) if self._special.isatty() else text  # such as /dev/stdout
            try:
                left = memoryview(text.encode("utf-8", "replace"))
                while left:
                    left = left[self._special.write(left) :]
            except OSError as error:
                raise refusal(self._path, error) from None

    def close(self) -> None:
        """The text is complete: a file gets it now. Without this call, a file stays as it was."""
        if self._special is not None:
            self._special.close()
        elif self._path is not None:
            write_text(self._path, "".join(self._pieces))


def _opened_special(path: Path) -> BinaryIO | None:
    """A pipe or a device, open for writing; None for what is, or will be, a file.

    Raises:
        OutputError: nobody reads from the pipe, or the device cannot be written to.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None  # what cannot be looked at is refused, with its reason, where a file is tested
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    try:
        # Without O_NONBLOCK a pipe that nobody reads would wait for a reader.
        number = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        os.set_blocking(number, True)
    except OSError as error:
        if stat.S_ISFIFO(mode):
            raise OutputError(
                f"{path}: cannot be written (nobody reads from this pipe); start its reader first"
            ) from None
        raise refusal(path, error) from None
    return open(number, "wb", buffering=0)

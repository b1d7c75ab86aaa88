"""Files of results that grow line by line, under a lock, with a check value in every line."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from restkv.errors import RestKVError
from restkv.files import reason, refusal
from restkv.saving.strict_json import shown

MOST_LINE = 16 << 20  # bytes


class RunError(RestKVError):
    """A folder of results that cannot be written, read, or gone on with."""


def opened(path: Path) -> BinaryIO:
    """A file to read from and to append to; made where there is none."""
    try:
        number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunError(str(refusal(path, error, "choose another --out"))) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise RunError(f"{path}: cannot be written (it is no regular file); choose another --out")
    return open(number, "r+b", buffering=0)


def lock(folder: Path, file: BinaryIO) -> None:
    """Keep other processes out of a folder until this one ends, however it does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{folder}: another run is writing there; wait for it or choose another --out") from None
    except OSError as error:
        raise RunError(f"{folder}: cannot be locked ({reason(error)}); choose an --out on another disk") from None


def cut_unfinished_line(file: BinaryIO) -> None:
    """Drop what a kill left of the last line."""
    text = file.read()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        file.truncate(whole)


def append_line(path: Path, file: BinaryIO, row: Mapping[str, Any], check: str | None = None) -> None:
    """Append a line with its check value, if there are any; it is on the disk then, or not there at all."""
    if check is not None:
        row = {**row, "check": check_value(row, check)}
    try:
        line = _written(row)
    except ValueError:
        wrong = ", ".join(name for name, value in row.items() if not _can_be_written(value))
        raise RunError(
            f"{path}: the result {shown(row.get('key'))} has {wrong} that cannot be written down: not a finite number, or half "
            "a character; the model fails"
        ) from None
    size = os.fstat(file.fileno()).st_size
    try:
        left = memoryview(line)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise RunError(str(refusal(path, error, "rerun to go on"))) from None


def check_value(row: Mapping[str, Any], check: str) -> str:
    """Of a row without it, in a run of these arguments."""
    return hashlib.sha256((check + json.dumps(row)).encode()).hexdigest()[:16]


def _written(row: Any) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _can_be_written(value: Any) -> bool:
    try:
        _written(value)
    except ValueError:
        return False
    return True


def lines(path: Path, most: int | None = None) -> Iterator[bytes]:
    """The lines of a file that may be anything: a pipe is not waited for, and a line without an end is not taken in.

    Raises:
        RunError: it cannot be read, is no file, has a line of more than MOST_LINE bytes, or more than `most` in all.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise RunError(f"{path}: cannot be read (it is no regular file); name the folder of a run")
        with open(number, "rb") as file:
            if most is not None and os.fstat(number).st_size > most:
                raise RunError(f"{path}: cannot be read (it has more than {most} bytes); name the folder of a run")
            while line := file.readline(MOST_LINE):
                if len(line) == MOST_LINE:
                    raise RunError(f"{path}: cannot be read (a line has more than {MOST_LINE} bytes)")
                yield line
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({reason(error)}); name the folder of a run") from None
    except ValueError as error:  # a zero byte in the folder's name
        if isinstance(error, RunError):
            raise
        raise RunError(f"{str(path)!r}: no folder can have this name; name the folder of a run") from None

"""Lack of memory: known before the operating system has to end the process, and said in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modeling.errors import TooLargeError
from modeling.free import free_bytes, size_text

if TYPE_CHECKING:
    import torch

LARGE = 1 << 26  # bytes; less is not worth a look at what is free
LACKS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
    r"|failed to map segment|can't start new thread|error return without exc",  # of libraries and threads that are to be started
    re.IGNORECASE,
)


def require(count: int, device: torch.device | None = None) -> None:
    """Refuse to begin what takes more memory of the host than is free. Linux would grant it, and end the process later.

    Raises:
        MemoryError: `count` bytes are not free.
    """
    if (device is not None and device.type != "cpu") or count < LARGE:
        return
    free = free_bytes()
    if free is not None and count > free:
        raise MemoryError(f"tried to allocate {count} bytes of {free} that are free")


def lacking(error: BaseException) -> str | None:
    """How much memory an error is about, in words such as " (8.1 GB were asked for)", or ""; None if it is another error."""
    said = str(error)
    lacks = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported
        or (isinstance(error, RuntimeError | ImportError | SystemError) and LACKS.search(said))
        or (isinstance(error, OSError) and (error.errno == errno.ENOMEM or LACKS.search(said)))
    )
    if not lacks:
        return None
    asked = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", said, re.IGNORECASE)
    if asked is None:
        return ""
    if asked[2] != "bytes":
        return f" ({asked[1]} {asked[2]} were asked for)"
    return f" ({size_text(int(asked[1]))} were asked for)" if int(asked[1]) >= 1e8 else ""


@contextmanager
def enough_memory(work: str, mend: str) -> Iterator[None]:
    """Around what may take too much of it.

    Raises:
        TooLargeError: there is not enough memory to do this work.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (asked := lacking(error)) is None:
            raise
        raise TooLargeError(f"not enough memory to {work}{asked}; {mend}") from None

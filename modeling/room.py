"""Lack of memory: known before the operating system has to end the process, and said in one line."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modeling.errors import TooLargeError

if TYPE_CHECKING:
    import torch

LARGE = 1 << 26  # bytes; less is not worth a look at what is free
MEMINFO, CGROUP, STATM = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/statm")
LACKS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
    r"|failed to map segment",  # of a library that is to be imported
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


def free_bytes() -> int | None:
    """Memory that the host, the container or the limit of this process (ulimit -v) can still give; None where nobody says."""
    said = [one for one in (_free_here(), _left_to_us()) if one is not None]
    return min(said, default=None)


def _left_to_us() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        return max(0, limit - int(STATM.read_text().split()[0]) * resource.getpagesize())
    except (OSError, ValueError):
        return None


def _free_here() -> int | None:
    try:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE))
        free = 1024 * (int(fields["MemAvailable"]) + int(fields.get("SwapFree", 0)))
    except (OSError, KeyError):
        return None
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        return min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))  # "max" is no number
    except (OSError, ValueError):
        return free


def lacking(error: BaseException) -> str | None:
    """How much memory an error is about, in words such as " (8.1 GB were asked for)", or ""; None if it is another error."""
    said = str(error)
    lacks = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported
        or (isinstance(error, RuntimeError | ImportError) and LACKS.search(said))
        or (isinstance(error, OSError) and (error.errno == errno.ENOMEM or LACKS.search(said)))
    )
    if not lacks:
        return None
    asked = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", said, re.IGNORECASE)
    if asked is None:
        return ""
    if asked[2] != "bytes":
        return f" ({asked[1]} {asked[2]} were asked for)"
    return f" ({int(asked[1]) / 1e9:.1f} GB were asked for)" if int(asked[1]) >= 1e8 else ""


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

"""How much memory is free: of the machine, under the limits of this process, and in its cgroups. Needs no torch."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMINFO, STATUS, CGROUPS = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")
# Limits, usage, and which part of the usage Linux gives back when asked: of version 2, and of version 1.
UNIFIED = ("memory.max", "memory.high"), "memory.current", "inactive_file"
LEGACY = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
ULIMITS = (resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d")


def free_bytes() -> int | None:
    """Memory that this process can still get: of the host, its cgroups and its own limits; None where nobody says."""
    return min(_free(), default=(None, ""))[0]


def free_text() -> str:
    """The same for an error, such as "2.1 GB are free under ulimit -v"; "" where nobody says."""
    free, place = min(_free(), default=(None, ""))
    return "" if free is None else f"{size_text(free)} are free{place}"


def free_addresses() -> int | None:
    """What `ulimit -v` leaves this process; None where there is no such limit."""
    most, used = resource.getrlimit(resource.RLIMIT_AS)[0], _kilobytes(STATUS).get("VmSize")
    return None if most == resource.RLIM_INFINITY or used is None else max(0, most - used)


def size_text(count: int) -> str:
    """
    >>> size_text(8_100_000_000), size_text(1_040_000)
    ('8.1 GB', '1.0 MB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _free() -> Iterator[tuple[int, str]]:
    """What each one who limits memory can still give, and who that is."""
    host = _kilobytes(MEMINFO)
    if "MemAvailable" in host:
        yield host["MemAvailable"] + host.get("SwapFree", 0), ""
    own = _kilobytes(STATUS)
    for limit, field, name in ULIMITS:
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and field in own:
            yield max(0, most - own[field]), f" under {name}"
    for folder, (limits, usage, reclaimable) in _cgroups():
        try:
            used = int((folder / usage).read_text())
            cached = re.search(rf"^{reclaimable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):
            continue
        used -= int(cached[1]) if cached else 0
        for name in limits:
            with suppress(OSError, ValueError):  # "max" is no number
                yield max(0, int((folder / name).read_text()) - used), " in its cgroup"


def _kilobytes(file: Path) -> dict[str, int]:
    """Name -> bytes, of a file of /proc; nothing where there is no such file."""
    try:
        return {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.M)}
    except OSError:
        return {}


def _cgroups() -> Iterator[tuple[Path, tuple[tuple[str, ...], str, str]]]:
    """The folders of this process's cgroups and of all above them, as far as they are mounted, and which files they have.

    A container often sees its own as the root of all, whatever their paths are outside of it.
    """
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = number == "0" and not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        top = CGROUP if unified else CGROUP / "memory"
        folder = top / path.strip("/")
        for one in (folder, *folder.parents):
            if one.is_relative_to(top):
                yield one, UNIFIED if unified else LEGACY

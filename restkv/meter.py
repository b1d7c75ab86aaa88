"""What a piece of work costs: seconds, peak memory as the operating system or the CUDA allocator saw it, compiled graphs."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Measures the peak of the whole process (CPU, resident bytes) or of the allocator (CUDA) since `__init__`.

    On Linux the kernel's high-water mark is reset first; where that is not allowed, the peak of the process's life so far is
    reported, which can only be too high.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")  # resets VmHWM to the current resident size

    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            return 1024 * int(_STATUS.read_text().split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Meter:
    """Seconds, peak memory and compiled graphs since `__init__`."""

    def __init__(self, device: torch.device) -> None:
        self._peak = PeakMemory(device)
        self._graphs = _compiled()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def peak_bytes(self) -> int:
        return self._peak.bytes()

    def graphs(self) -> int:
        """Graphs torch.compile has made since."""
        return _compiled() - self._graphs


def _compiled() -> int:
    """A process that has not loaded the compiler has compiled nothing."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]

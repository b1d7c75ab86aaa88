"""A measured process: loads one model its own way, then does what the bench asks, one JSON line in, one out.

Ours and our peers' run through the same loop, each in a process (and, for peers, an environment) of its own, so that nobody's
imports, thread pools or allocators touch another's figures. This file imports neither restkv nor transformers: peers that have
only one of them run it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch


class WorkerDied(RuntimeError):
    """A contestant's process has ended before its answer."""


class Worker(ABC):
    """What a measured process can be asked to do."""

    device = "cpu"

    @abstractmethod
    def prefill(self, context: int, batch: int) -> None:
        """Run `batch` random prompts of so many tokens into a fresh cache."""

    @abstractmethod
    def fill(self, context: int, batch: int) -> None:
        """Leave a cache as large as `prefill` would, of random keys and values, without running the prompts."""

    @abstractmethod
    def decode(self) -> None:
        """Generate one token for every row, greedily, from the cache prefill left."""

    @abstractmethod
    def drop(self) -> None:
        """Let go of the cache."""

    def prepare(self, op: str, **values: Any) -> None:  # noqa: B027 - most have nothing to do
        """What a command needs before every time that it is carried out; it is not timed."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is in the cache: `kept` entries per row and KV head, `cache_bytes`; anything else worth a row. Nothing if there
        is none."""


def serve(worker: Worker) -> None:
    """Answer commands on stdin until it ends, each a line of JSON."""
    for line in sys.stdin:
        print(json.dumps(answer(worker, **json.loads(line))), flush=True)


def answer(worker: Worker, op: str, tokens: int = 1, **values: Any) -> dict[str, Any]:
    """What a command comes to, which is carried out `tokens` times: seconds each time, memory, graphs, the worker's description.

    Seconds are wall clock, the device waited for. `peak_above` is the peak of memory above what was in use when the command
    came: resident bytes of the process, or the CUDA allocator's.

    Args:
        op: the name of a method of the worker, such as prefill; `values` are its arguments.
    """
    cuda = worker.device.startswith("cuda")

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    before = _in_use(cuda)
    laps = []
    for _ in range(tokens):
        worker.prepare(op, **values)
        start = now()
        getattr(worker, op)(**values)
        laps.append(now() - start)
    memory = {"before_bytes": before, "peak_above": _peak(cuda) - before, "after_bytes": _in_use(cuda, reset=False)}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"seconds": laps, **memory, "graphs": graphs, **worker.describe()}


class Process:
    """The bench's end of a worker: `ask` sends a command and waits for its answer."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        python: str | None = None,
        threads: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._asked = False  # and not answered yet
        # As restkv's command line sets it. Threads that spin for long would measure each other, when workers share few cores.
        waiting = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "5000"}
        self._process = subprocess.Popen(
            [python or sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | waiting | (environment or {}),
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # a terminal's Ctrl-C is for the bench, which ends its workers
        )

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        """Raises WorkerDied when the process died; its own traceback is on stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asked = True
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(
                f"the worker {self.name} died (exit status {self._process.wait()}); see its message above, or ask for less"
            )
        self._asked = False
        return json.loads(line)

    def close(self) -> None:
        if self._asked:  # something went wrong while it worked; nobody wants its answer
            self._process.kill()
        # Leaving closes the pipes: the worker's loop ends with its stdin. One that has died leaves a pipe that cannot be flushed,
        # and what `ask` said of it is what counts.
        with contextlib.suppress(BrokenPipeError), self._process:
            pass


def _in_use(cuda: bool, reset: bool = True) -> int:
    """Bytes in use now; the peak is counted from here on."""
    if cuda:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or it would count as in use
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; this bench needs Linux")

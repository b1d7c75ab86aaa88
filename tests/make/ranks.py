"""Processes that share a model over gloo on this machine, and what each of them found.

One process imports everything once and forks the others. A hang is a failure: nobody waits longer than `seconds`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from make.places import ROOT, environment
from modeling.ranks import Ranks

JOBS, FOUND = "jobs.pt", "found-{}.pt"


class Job(NamedTuple):
    """`function` ("module:name") of the first `size` ranks, called with their Ranks and the arguments."""

    size: int
    function: str
    arguments: tuple[Any, ...] = ()


def run_ranks(folder: Path, jobs: Sequence[Job], seconds: float = 300) -> list[list[Any]]:
    """What every job returned on each of its ranks. As many processes are started as the largest one needs."""
    torch.save(list(jobs), folder / JOBS)
    process = subprocess.Popen(
        [sys.executable, "-m", "make.ranks", str(folder)],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"ranks still run after {seconds} s") from None
    assert process.returncode == 0, said
    size = max(job.size for job in jobs)
    found = [torch.load(folder / FOUND.format(rank), weights_only=False) for rank in range(size)]
    return [[found[rank][index] for rank in range(job.size)] for index, job in enumerate(jobs)]


def main(folder: Path) -> int:
    """Fork a process for each rank and wait for all; the first that fails ends the others."""
    import modeling

    assert Path(modeling.__path__[0]).parent == ROOT, "another copy of the packages would be tested"
    jobs: list[Job] = torch.load(folder / JOBS, weights_only=False)
    for job in jobs:
        importlib.import_module(job.function.partition(":")[0])
    children = set()
    for rank in range(max(job.size for job in jobs)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _work(folder, jobs, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
                time.sleep(0.5)  # the first to fail says so first
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.add(pid)
    while children:
        pid, status = os.wait()
        children.discard(pid)
        if status:
            for other in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _work(folder: Path, jobs: Sequence[Job], rank: int) -> None:
    size = max(job.size for job in jobs)
    dist.init_process_group(
        "gloo", f"file://{folder / 'meet'}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    groups: dict[int, Any] = {}
    for count in sorted({job.size for job in jobs}):
        groups[count] = dist.group.WORLD if count == size else dist.new_group(range(count))
    found = []
    for job in jobs:
        module, _, name = job.function.partition(":")
        here = rank < job.size
        ranks = Ranks(rank, job.size, groups[job.size].group_name) if here and job.size > 1 else Ranks()
        found.append(getattr(importlib.import_module(module), name)(ranks, *job.arguments) if here else None)
    torch.save(found, folder / FOUND.format(rank))
    dist.barrier()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""The processes that share a model, and the only two ways in which anything crosses them: sums and gatherings (docs/parallel.md).

Rank r of n has the r-th n-th of the KV heads with their query heads, of the MLP's width and of the vocabulary. Alone, there is
one rank, everything is its own, and nothing crosses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.environment import first_line
from modeling.errors import ParallelError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process it has started


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that share a model. Every method is called by all of them, in the same order.

    Args:
        rank, size: this one's number, and how many there are.
        group: name of their process group, as functional collectives take it.
        device: where numbers are put to cross.
    """

    rank: int = 0
    size: int = 1
    group: str = ""
    device: str = "cpu"

    # -- whose is what

    def part(self, count: int) -> slice:
        """Which of `count` things are this rank's: equal parts in order, of which the last may be smaller.

        >>> [Ranks(rank, 4).part(131) for rank in (0, 3)]
        [slice(0, 33, None), slice(99, 131, None)]
        """
        each = self.each(count)
        start = min(self.rank * each, count)
        return slice(start, min(start + each, count))

    def each(self, count: int) -> int:
        """How many of `count` things the first rank has, which no other has more of."""
        return -(-count // self.size)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what `gather` returns."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]

    # -- tensors, also in a compiled graph

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks of tensors of one shape and dtype; the same bits on each of them."""
        if self.size == 1:
            return x
        collectives = torch.ops._c10d_functional
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", self.group))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tensors, of one shape and dtype, one after another along `dim`."""
        if self.size == 1:
            return x
        collectives = torch.ops._c10d_functional
        whole = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), self.size, self.group))
        return torch.cat(whole.chunk(self.size), dim)

    # -- numbers of the host

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, in order of rank: as many of each. Whole numbers are exact up to 2^53."""
        if self.size == 1:
            return [list(numbers)]
        row_1n = torch.tensor([list(numbers)], dtype=torch.float64, device=self.device)
        return self.gather(row_1n, 0).tolist()  # sync: for the host

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any rank has of each number."""
        return [int(max(column)) for column in zip(*self.table(numbers), strict=True)]

    def share(self, text: str) -> str:
        """The text of rank 0, whatever the others have."""
        if self.size == 1:
            return text
        data = text.encode("utf-8", "surrogatepass") if self.rank == 0 else b""
        byte_n = torch.zeros(self.most([len(data)])[0], dtype=torch.int32)
        byte_n[: len(data)] = torch.tensor(list(data), dtype=torch.int32)
        return bytes(self.sum(byte_n.to(self.device)).tolist()).decode("utf-8", "surrogatepass")  # sync: for the host


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """Meet the processes that torchrun has started with this one: over NCCL on CUDA, else over gloo.

    A default process group that is there already is used as it is.

    Raises:
        ParallelError: this process was not started by torchrun, or the others cannot be reached.
    """
    dist: Any = torch.distributed
    if not dist.is_available():
        raise ParallelError("parallel 'tensor': this build of torch has no torch.distributed; load without it")
    if not dist.is_initialized():
        for name in VARIABLES:
            if name not in os.environ:
                raise ParallelError(
                    f"parallel 'tensor': {name} is not set, so this process is alone; start it with torchrun "
                    "--nproc-per-node N, or load without it"
                )
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ParallelError(
                f"parallel 'tensor': the other ranks cannot be reached at {place} ({first_line(error)}); mend that, or "
                "load without it"
            ) from None
    if dist.get_world_size() == 1:
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name, str(device))


def local_device() -> torch.device:
    """This process's GPU among those of its machine, of which torchrun starts one process each.

    Raises:
        ParallelError: it has fewer.
    """
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise ParallelError(
            f"parallel 'tensor': local rank {index} has no GPU, there are {count}; start at most as many processes on a "
            "machine, or give device='cpu'"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)

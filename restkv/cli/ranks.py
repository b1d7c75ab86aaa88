"""A command that torchrun has started several times: rank 0 speaks, and of what goes wrong the rank that it goes wrong on first.

torch is not imported here before something has failed.
"""

from __future__ import annotations

import io
import os
import re
import sys
from datetime import timedelta
from typing import Any

from restkv.cli import terminal

COMMANDS = ("generate", "inspect", "methods")  # which several processes may run together
LOST = re.compile(
    r"gloo|NCCL|ncclUnhandled|TCPStore|Connection (closed|reset|refused)|Broken pipe|socket", re.IGNORECASE
)
STORE_WAIT = timedelta(seconds=5)


def place() -> tuple[int, int]:
    """This process's rank, and how many torchrun has started; (0, 1) for one that it has not."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" not in os.environ or not (rank.isdigit() and size.isdigit()):
        return 0, 1
    return int(rank), int(size)


def hush() -> None:
    """Let only rank 0 be heard."""
    if place()[0] > 0:
        terminal.hushed = True
        sys.stdout = _Nowhere()


class _Nowhere(io.StringIO):
    """What is written here is gone."""

    def write(self, text: str) -> int:
        return len(text)


def prefix() -> str:
    """What an error's line begins with, where it has to say whose it is."""
    rank, size = place()
    return f"rank {rank} of {size}: " if size > 1 and _begun() else ""


def may_speak() -> bool:
    """Whether no other rank has failed before this one. All say no more than one line."""
    rank, size = place()
    if size == 1:
        return True
    if not _begun():  # a mistake on the command line, which all ranks have made
        return rank == 0
    try:
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's own store, which outlives its processes
        store = TCPStore(address, port, is_master=False, timeout=STORE_WAIT)
        return store.add(f"restkv/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", 1) == 1
    except Exception:  # by version and by what is wrong: then two lines are better than none
        return True


def _begun() -> bool:
    """Whether the work has begun: it begins with the import of torch."""
    return "torch" in sys.modules


def lost(error: BaseException) -> str | None:
    """The line for a rank that another one has left alone; None for any other error."""
    if place()[1] == 1 or not isinstance(error, RuntimeError | OSError) or not LOST.search(str(error)):
        return None
    said = " ".join(str(error).split())
    return f"another rank has ended or cannot be reached ({said[:160]}); torchrun says below which one and how"


def part(code: int) -> int:
    """Leave the other ranks: in order, or, with a code that says that something failed, at once."""
    if place()[1] > 1:
        dist: Any = sys.modules.get("torch.distributed")
        if code:
            sys.stderr.flush()
            os._exit(code)  # nothing waits for what others will not send
        if dist is not None and dist.is_initialized():
            dist.destroy_process_group()
    return code

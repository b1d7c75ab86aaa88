"""Fixtures: tiny random checkpoints (tests/make/families.py) and the real stories260k of the shared folder."""

from __future__ import annotations

import os
import zlib

# Before torch starts its threads: one each for the pytest workers, and none that spins while it waits (on busy cores
# that costs a factor of ten).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

from make.families import save_case
from make.places import ROOT
from make.rambler import save_rambler

settings.register_profile("restkv", deadline=None)  # a busy machine is no failure
settings.load_profile("restkv")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every run of a test draws the same tensors, whichever worker runs it, whatever ran before, in whichever folder it lies."""
    name = request.node.nodeid.removeprefix(str(request.path.parent.relative_to(ROOT)))
    torch.manual_seed(zlib.crc32(f"tests{name}".encode()))


@dataclass(frozen=True)
class TinyCheckpoint:
    """A saved random checkpoint and the transformers model it was saved from."""

    folder: Path
    reference: transformers.PreTrainedModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyCheckpoint]:
    """tiny(name): the checkpoint of families.CASES[name], made once per session. Do not write to its folder."""
    made: dict[str, TinyCheckpoint] = {}

    def get(name: str) -> TinyCheckpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = TinyCheckpoint(folder, save_case(name, folder))
        return made[name]

    return get


@pytest.fixture(scope="session")
def rambler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint that never stops talking (tests/make/rambler.py). Do not write to it."""
    folder = tmp_path_factory.mktemp("rambler")
    save_rambler(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data folder: $RESTKV_SHARED, or ../shared beside the repository."""
    folder = Path(os.environ.get("RESTKV_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set RESTKV_SHARED")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real, tiny, pretrained Llama."""
    folder = shared / "checkpoints" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")
    return folder

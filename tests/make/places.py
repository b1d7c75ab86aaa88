"""Where the tests' own files lie, and the environment of processes that import from there."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent  # the repository
DATA = TESTS / "data"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for one that imports the packages, and the tests' helpers (`from make.small import ...`)."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}

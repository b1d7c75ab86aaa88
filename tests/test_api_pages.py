"""The API reference is written from the docstrings by one command."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import restkv

ROOT = Path(restkv.__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc is not installed")
def test_pages_are_written() -> None:
    subprocess.run([sys.executable, str(ROOT / "checks.py"), "api"], check=True)
    page = (ROOT / "build" / "api" / "restkv" / "lm.html").read_text(encoding="utf-8")
    assert 'id="LM.generate"' in page and "ragged" in page
    for path in ("chat", "context", "policies", "observe", "errors"):
        assert (ROOT / "build" / "api" / "restkv" / f"{path}.html").is_file()
    assert subprocess.run(["git", "check-ignore", "-q", "build/api"], cwd=ROOT, check=False).returncode in (0, 128)

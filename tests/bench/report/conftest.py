"""Fixtures of the tests of reports: a folder of results that nobody has altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from make.result_folders import filled


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write to it."""
    return filled(tmp_path_factory.mktemp("whole") / "run")

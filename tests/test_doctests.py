"""Examples in docstrings are true: `>>>` of every module is run as it stands, from the repository's root."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from make.places import ROOT

PACKAGES = ("modeling", "restkv", "bench")


def modules_with_examples() -> list[str]:
    """Only these are imported: some modules (peers, workers) need packages of other environments."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = [path.relative_to(ROOT) for path in files if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]


def test_there_are_examples() -> None:
    assert len(modules_with_examples()) >= 8


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_are_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for examples in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(examples, out=said.append)
    assert runner.tries > 0, f"{Path(str(module.__file__)).name}: its examples are in no docstring that doctest finds"
    assert not runner.failures, "".join(said)

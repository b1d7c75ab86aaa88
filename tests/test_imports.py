"""The order of the packages, read from their sources: modeling -> restkv -> bench, and who may know what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from make.places import ROOT, TESTS
from modeling.families.registry import FAMILIES

ORDER = ("modeling", "restkv", "bench")  # each may import itself and those before it
SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
FAMILY_FILES = {
    ROOT / "modeling" / "families" / f"{entry[1].__module__.rpartition('.')[2]}.py" for entry in FAMILIES.values()
}
FAMILY_NAMES = {path.stem.rstrip("0123456789") for path in FAMILY_FILES}
OF_TESTS = {"tests", "conftest", *(path.parent.name for path in TESTS.glob("*/__init__.py"))}
ROPE_KINDS = {"llama3"}  # a rope type that Hugging Face named after a family; any family may have it


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_peer(path: Path) -> bool:
    return path.is_relative_to(ROOT / "bench" / "speed" / "peers")


SCRIPT = ROOT / "bench" / "speed" / "peers" / "convert.py"  # run in a process of its own and imported by nothing


def imported(path: Path, whole: bool = False) -> set[str]:
    """Top-level (or whole) names of everything a file imports, inside functions and TYPE_CHECKING blocks as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "") if node.level else str(node.module))
    return {name if whole or name.startswith(".") else name.partition(".")[0] for name in names}


def imported_names(path: Path) -> set[str]:
    """Dotted names of modules, and of what is imported from them: any of these may be a module."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return imported(path, whole=True) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def words(tree: ast.Module) -> Iterator[str]:
    """Identifiers and strings of the code, without docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias | ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20 and len(FAMILY_FILES) >= 4


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packages_import_only_what_comes_before_them(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not imported(path) & {*ORDER[ORDER.index(package) + 1 :], *OF_TESTS}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=relative)
def test_no_test_imports_from_a_test(path: Path) -> None:
    """What several need is in tests/make, tests/twins or tests/laws."""
    assert not {name for name in imported(path, whole=True) if name.rpartition(".")[2].startswith("test_")}


@pytest.mark.parametrize("path", [path for path in SOURCES if not is_peer(path)], ids=relative)
def test_only_tests_and_peers_know_transformers(path: Path) -> None:
    assert not imported(path) & {"transformers", "kvpress", "accelerate", "gguf"}


def test_that_script_is_imported_by_nothing_and_imports_nothing_of_ours() -> None:
    assert not imported(SCRIPT) & {*ORDER, *OF_TESTS}
    importers = [path for path in SOURCES if path != SCRIPT and "bench.speed.peers.convert" in imported_names(path)]
    assert importers == []


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if not is_peer(path) and path not in FAMILY_FILES], ids=relative
)
def test_family_names_stay_in_the_family_files(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == ROOT / "modeling" / "families" / "registry.py":  # its one registry: the import and the tuple of modules
        tree.body = [node for node in tree.body if not isinstance(node, ast.ImportFrom | ast.AnnAssign)]
    told = {word for word in words(tree) if any(name in word.lower() for name in FAMILY_NAMES)}
    assert not told - ROPE_KINDS


def test_the_check_of_names_sees_code_and_not_docstrings() -> None:
    tree = ast.parse('"""llama"""\ndef f(gemma):\n    "qwen"\n    return mistral.x == "llama"\n')
    assert set(words(tree)) >= {"gemma", "mistral", "llama"} and "qwen" not in set(words(tree))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "modeling")], ids=relative)
def test_modeling_knows_nothing_of_eviction(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {word for word in words(tree) if word.lower() in {"policy", "policies", "scorer", "evict", "snapkv"}}

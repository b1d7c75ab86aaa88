"""No module imports itself in a circle, and every room imports only those below it: docs/architecture.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
PACKAGES = ("modeling", "restkv", "bench")
# Each may import itself and those before it. What lies in no room, such as restkv/lm.py, is held by the order of the packages and
# by the absence of circles alone.
ROOMS = (
    "modeling.text",
    "modeling.families",
    "modeling.checkpoint",
    "restkv.policies",
    "restkv.saving",
    "restkv.testing",
    "restkv.cli",
    "bench.models",
    "bench.runs",
    "bench.report",
    "bench.quality",
    "bench.published",
    "bench.recall_mini",
    "bench.speed",
    "bench.harness",
    "bench.cli",
)
# The known exception.
UPWARD = {("modeling.text.special_tokens", "modeling.families.registry")}  # some tokenizer files differ by family

Graph = Mapping[str, set[str]]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph_of(sources: Mapping[str, str]) -> Graph:
    """Module -> modules that it imports, inside functions and TYPE_CHECKING blocks as well, of those that are in `sources`."""
    return {name: {one for one in imported(text) if one in sources and one != name} for name, text in sources.items()}


def imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circle_in(graph: Graph) -> list[str]:
    """Modules of one circle, if there is any."""
    # A room's own __init__ is imported before its modules, whoever imports them.
    plain = {name: {one for one in some if not name.startswith(f"{one}.")} for name, some in graph.items()}
    try:
        TopologicalSorter(plain).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
GRAPH = graph_of(SOURCES)


def test_no_circle() -> None:
    assert circle_in(GRAPH) == []


def test_the_check_sees_a_circle_wherever_it_is_closed() -> None:
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "if TYPE_CHECKING:\n    from a import y"}
    assert set(circle_in(graph_of(sources))) == {"a", "b", "c"}
    assert circle_in(graph_of({**sources, "c": "import os"})) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    inside = [name for name in GRAPH if room_of(name) == room]
    assert inside, "no such room"
    higher = ROOMS[ROOMS.index(room) + 1 :]
    upward = {(name, one) for name in inside for one in GRAPH[name] if room_of(one) in higher}
    assert upward == {pair for pair in UPWARD if room_of(pair[0]) == room}


def test_every_folder_is_a_room() -> None:
    folders = {".".join(name.split(".")[:2]) for name in SOURCES if name.count(".") > 1}
    assert folders <= set(ROOMS)
    assert {name for name in SOURCES if name.startswith("bench.") and room_of(name) is None} == set()

"""Option groups: typer sees every option of one in its place, and the command gets the group back."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Annotated

import typer
from typer.testing import CliRunner

from restkv.cli.groups import spread


@dataclass(frozen=True)
class Size:
    needed: Annotated[int, typer.Option("--width")]
    depth: int = 3


HIGH = Size(7, depth=8)
seen: list[object] = []


@spread
def build(*, name: str, size: Size, tall: bool = False) -> None:
    """Build it."""
    seen.append((name, size, tall))


@spread
def rebuild(*, size: Size = HIGH) -> None:
    seen.append(size)


app = typer.Typer()
for one in (build, rebuild):
    app.command()(one)


def run(*words: str) -> object:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return seen.pop()


def test_a_group_stands_as_its_options_where_it_was():
    assert list(signature(build).parameters) == ["name", "needed", "depth", "tall"]
    assert (build.__name__, build.__doc__) == ("build", "Build it.")
    assert run("build", "hut", "--width", "2", "--tall") == ("hut", Size(2, 3), True)
    assert run("build", "hut", "--depth", "5", "--width", "2") == ("hut", Size(2, 5), False)


def test_an_option_without_a_default_has_to_be_given():
    assert CliRunner().invoke(app, ["build", "hut"]).exit_code == 2
    assert not seen


def test_a_group_given_as_default_gives_its_options_theirs():
    assert run("rebuild") == HIGH
    assert run("rebuild", "--width", "1") == Size(1, 8)

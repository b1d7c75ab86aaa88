"""Every count of a command line has a maximum, and what would take too much time or memory is refused before it begins."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.quality.prose import MOST_MADE, require_room
from modeling import room
from restkv.cli import main
from restkv.cli.app import _command
from restkv.cli.options import MOST_TEXT
from restkv.errors import PromptError, TooLargeError

HUGE = 10**30
SEEDS = "--seed"  # a name for what is drawn, and no count
LIST = re.compile(r"(\d[\d.]*[,:])*\d[\d.]*")
NEEDED = {
    "bench anli": ["--data", "x"],
    "bench documents": ["--data", "x"],
    "bench longbench": ["--data", "x"],
    "bench infinitebench": ["--data", "x"],
    "bench ruler-official": ["--data", "x"],
    "bench needle-official": ["--data", "x"],
}


def options() -> Iterator[tuple[str, Any]]:
    """Every option of every command, but for those of other packages."""

    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{words} {name}".strip())
        for one in () if hasattr(command, "commands") else command.params:
            yield words, one

    return walk(_command(), "")


def long_name(option: Any) -> str:
    return next((name for name in option.opts if name.startswith("--")), option.opts[0])


COUNTS = [(words, one) for words, one in options() if one.type_descriptor.annotation is int]
LISTS = [  # texts that are numbers
    (words, one)
    for words, one in options()
    if one.type_descriptor.annotation is str
    and ((isinstance(one.default, str) and LIST.fullmatch(one.default)) or long_name(one) == "--lengths")
]


def named(found: list[tuple[str, Any]]) -> list[str]:
    return [f"{words} {long_name(one)}" for words, one in found]


def test_the_options_are_found() -> None:
    assert len(COUNTS) > 40 and {"--lengths", "--contexts", "--batches", "--budgets", "--rounds"} <= {
        long_name(one) for _, one in LISTS
    }


@pytest.mark.parametrize(("words", "option"), COUNTS, ids=named(COUNTS))
def test_every_count_has_a_maximum(words: str, option: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = long_name(option)
    if name == SEEDS:
        return
    assert option.max is not None, f"{words} {name} counts without end"
    for value in (int(option.max) + 1, HUGE):
        assert main([*words.split(), *NEEDED.get(words, []), name, str(value)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("restkv: error: ")
        assert name in line and str(value) in line and str(int(option.max)) in line


@pytest.mark.parametrize(("words", "option"), LISTS, ids=named(LISTS))
def test_every_list_of_numbers_has_a_maximum(
    words: str, option: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "essay.txt").write_text("Tom has a red kite. " * 50)
    began = time.monotonic()
    assert main([*words.split(), *NEEDED.get(words, []), long_name(option), str(HUGE)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("restkv: error: ")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench needle-official --data x --lengths 1:99999999999999999:1", "give lengths of at most 16777216"),
        ("bench needle-official --data x --lengths 1:9999999:1", "no more than 10000"),
        ("bench perplexity --windows 1000000", "texts of 384000000 tokens would have to be made first"),
        ("bench smoothing --samples 1000000", "texts of 2048000000 tokens would have to be made first"),
        ("bench smoothing --windows 1000000", "would have to be made first"),
        ("bench fidelity --tasks vt --windows 1000000", "texts of 384000000 tokens would have to be made first"),
        ("generate -p a -n 9223372036854775808", "'--max-new-tokens'"),
        ("warmup --rows 65536 --prompt-tokens 16777216", "not enough memory to draw 65536 prompts of 16777216 tokens"),
    ],
)
def test_what_nobody_could_wait_for_is_refused_at_once(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and time.monotonic() - began < 30


def test_plans_look_whether_there_is_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 100 << 20)
    assert main("bench ruler --samples 1000000".split()) == 2
    assert "not enough memory to plan 14,000,000 questions" in capsys.readouterr().err
    for command in (
        f"demo --context {MOST_TEXT}",
        f"bench kept --context {MOST_TEXT}",
        "bench perplexity --windows 9999",
    ):
        assert main(command.split()) == 2
        assert "not enough memory to make texts of" in capsys.readouterr().err
    require_room(1000)
    require_room(MOST_MADE, 1000)
    with pytest.raises(TooLargeError):
        require_room(MOST_MADE)
    with pytest.raises(PromptError, match="ask for less"):
        require_room(MOST_MADE + 1, 1)

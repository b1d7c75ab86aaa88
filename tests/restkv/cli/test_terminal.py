"""What reaches a terminal, a pipe or a file: nothing foreign is obeyed, pipes get the truth, no environment breaks it."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.cli.options import print_table
from bench.quality.kept import Kept, terminal
from make.places import ROOT
from make.terminals import CLIPBOARD, HOSTILE, Terminal, clean
from modeling.shown import LONGEST, one_line, shown
from restkv.cli import main
from restkv.cli.console import PlainConsole
from restkv.cli.display import holdings
from restkv.cli.terminal import json_text, put
from restkv.errors import RestKVError, RestKVWarning
from restkv.results import Stats

texts = st.text(st.characters() | st.sampled_from("\x1b\x07\r\n\t\x7f\x9b\u202e\ud800\U000e0041"))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Run:
    """on_terminal(*arguments, stdin=text): one command line whose streams are terminals: exit code, stdout, stderr."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setenv("TERM", "xterm")
        out, err = Terminal(), Terminal()
        for name, stream in (("stdin", io.StringIO(stdin)), ("stdout", out), ("stderr", err)):
            monkeypatch.setattr(sys, name, stream)
        code = main(list(map(str, arguments)))
        said = re.sub(r"(\r\x1b\[K[^\r\n]*)*\r\x1b\[K", "", err.getvalue())  # every passing line is taken back
        return code, re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()), said  # less rich's own styles

    return run


# -- the one function


@given(texts, texts)
def test_what_is_shown_obeys_nothing_and_comes_in_any_pieces(first: str, second: str) -> None:
    both = shown(first + second)
    assert clean(both) and both == shown(first) + shown(second) == shown(both)
    assert len(both.splitlines()) <= (first + second).count("\n") + 1
    line = one_line(first + second)
    assert clean(line) and "\n" not in line and "\t" not in line


@pytest.mark.parametrize(
    "code", [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, *range(0x2028, 0x202F), 0x2066, 0xD800]
)
def test_every_control_is_shown_as_its_escape(code: int) -> None:
    expected = chr(code) if code in (9, 10) else chr(code).encode("unicode_escape").decode()
    assert shown(f"a{chr(code)}b") == f"a{expected}b"


def test_words_of_any_language_stay_as_they_are() -> None:
    text = "naïve 東京\u3000Ελλάδα עברית العربية\u00a0! क्\u200dष 👩\u200d👧 \\x1b [bold] \t\n"
    assert shown(text) == text


def test_errors_and_remarks_are_one_line_wherever_they_are_printed() -> None:
    for made in (RestKVError(f"{HOSTILE}\nb"), RestKVWarning(f"{HOSTILE}\nb")):
        assert clean(str(made)) and "\n" not in str(made) and str(made).startswith(r"a\x1b]52;c;aGk=\x07b c\x08d\x7f")
    long = str(RestKVError("x" * 10**7 + "; the mend"))
    assert len(long) < LONGEST + 100 and long.endswith("; the mend")


# -- the doors


def test_an_answer_is_escaped_on_a_terminal_and_true_in_a_file(on_terminal: Run, hostile: Path, tmp_path: Path) -> None:
    arguments, file = ("generate", hostile, "-p", "Lily", "-n", 6), tmp_path / "answer"
    code, seen, err = on_terminal(*arguments)
    assert code == 0 and clean(seen) and seen.count(r"\x1b]52;c;aGk=\x07\r\x9b31m\u202e") == 6 and clean(err)
    assert on_terminal(*arguments, "-o", file)[:2] == (0, "")
    told = file.read_bytes().decode()
    assert told.count(f"{CLIPBOARD}\r\x9b31m\u202e") == 6 and shown(told) == seen
    code, seen, _ = on_terminal(*arguments, "--json")
    assert code == 0 and clean(seen) and json.loads(seen)["text"] == told.removesuffix("\n")


def test_a_pipe_gets_the_text_as_it_is(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(hostile), "-p", "Lily", "-n", "6"]) == 0
    assert capsys.readouterr().out.count(f"{CLIPBOARD}\r\x9b31m\u202e") == 6


def test_a_chat_escapes_too(on_terminal: Run, hostile: Path) -> None:
    lines = f"Lily\n/save\x1b[2J\n/save /no/{CLIPBOARD}\n/method a\x9bb\n"
    code, out, err = on_terminal("chat", hostile, "--budget", 40, "-n", 4, stdin=lines)
    assert code == 0 and clean(out) and out.count(r"\x1b]52") == 4
    assert len(err.splitlines()) == 3
    assert all(line.startswith("restkv: error: ") and clean(line) for line in err.splitlines())


def broken_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HOSTILE: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(f"{{{{ raise_exception({json.dumps(HOSTILE)}) }}}}")


def broken_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [broken_tensor, broken_template, broken_config])
def test_what_a_checkpoint_says_in_an_error_is_escaped(
    damage: Callable[[Path], None], rambler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"model{CLIPBOARD}\r[red]"
    copytree(rambler, folder)
    damage(folder)
    assert main(["generate", str(folder), "-p", "Lily", "-n", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and clean(err) and len(err.splitlines()) == 1 and r"\x1b]52" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE.strip("\x00")],
        ["generate", "-n", HOSTILE],
        ["generate", f"--{HOSTILE}"],
        ["generate", "-p", "a", "--method", HOSTILE],
        ["generate", "-p", "a", "--set", HOSTILE],
        ["generate", "-p", "a", "--set", f"{HOSTILE}=1"],
        ["generate", "-p", "a", "--dtype", HOSTILE],
        ["generate", "--prompt-file", f"no/{CLIPBOARD}"],
        ["generate", "-p", "a", "-o", f"no/{CLIPBOARD}"],
        ["inspect", f"no/{CLIPBOARD}\udcff"],
        ["methods", "--bytes", f"no/{CLIPBOARD}"],
        ["bench", "report", f"no/{CLIPBOARD}"],
        ["bench", CLIPBOARD],
        ["chat", "--load", f"no/{CLIPBOARD}"],
    ],
)
def test_arguments_quoted_in_an_error_are_escaped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and clean(err) and len(err.splitlines()) == 1


def test_remarks_of_anybody_are_escaped(on_terminal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn(HOSTILE, RestKVWarning, stacklevel=1)
        warnings.warn(HOSTILE, FutureWarning, stacklevel=1)
        raise RestKVError("that is all")

    monkeypatch.setattr("modeling.checkpoint.loading.load_outline", warn)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: print(category.__name__, message, file=sys.stderr)
        code, _, err = on_terminal("inspect")
    first, second, third = err.splitlines()
    assert code == 2 and clean(err) and third == "restkv: error: that is all"
    assert first.startswith(r"restkv: note: a\x1b]52;") and second.startswith(r"FutureWarning a\x1b]52;")


def test_a_name_of_a_checkpoint_keeps_a_table_in_shape(on_terminal: Run, rambler: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"run[snapkv]{CLIPBOARD}\r\u202e"
    copytree(rambler, folder)
    code, seen, _ = on_terminal("inspect", folder)
    assert code == 0 and clean(seen)
    assert r"run[snapkv]\x1b]52;c;aGk=\x07\r\u202e" in seen.replace("\n", "")


def printed(what: Callable[[PlainConsole], object], width: int = 60) -> str:
    file = io.StringIO()
    what(PlainConsole(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [24, 60, 200])
def test_hostile_cells_keep_the_layout(width: int) -> None:
    names = [HOSTILE, "run[snapkv]", "[/]", ":smile:", "東京\x1b[2J", "tab\tand\nline", "plain"]
    text = printed(lambda console: print_table(console, HOSTILE, ["name", HOSTILE], [[n, n] for n in names]), width)
    assert clean(text)
    lines = [line for line in text.splitlines() if line[:1] in "┏┡│└├┃"]
    assert {PlainConsole(width=width).measure(line).maximum for line in lines} == {
        PlainConsole(width=width).measure(lines[0]).maximum
    }
    if width == 200:
        for name in ("run[snapkv]", "[/]", ":smile:", r"a\x1b]52;c;aGk=\x07b", "[bold]x[/bold]"):
            assert name in text


def test_texts_that_nobody_escaped_are_escaped_when_they_are_rendered() -> None:
    from rich.text import Text

    table = Table("a")
    table.add_row(Text(HOSTILE))
    assert clean(printed(lambda console: console.print(table, Text(HOSTILE), HOSTILE)))


def test_pieces_of_a_prompt_are_escaped_over_the_map_of_what_was_kept() -> None:
    import numpy as np

    kept = Kept(HOSTILE, (HOSTILE, "b\x1b[2J"), np.ones((1, 1, 2)))

    def show(console: PlainConsole) -> None:
        for line in terminal(kept, 20):
            console.print(line)

    text = printed(show, 200)
    assert clean(text) and text.count(r"\x1b]52;c;aGk=\x07") == 2


@given(st.recursive(texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8))
def test_json_says_the_same_and_obeys_nothing(value: object) -> None:
    assert json.loads(json_text(value)) == value and clean(json_text(value))


def test_json_survives_a_stream_of_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", errors="backslashreplace"))
    put(json_text({"text": "é 東 👧"}))
    assert json.loads(raw.getvalue()) == {"text": "é 東 👧"}


def test_nobody_writes_past_the_doors() -> None:
    """Every print and console of the command line is one of ours; scripts that only developers run may print."""
    files = [file for room in ("restkv", "modeling", "bench/cli") for file in (ROOT / room).rglob("*.py")]
    found = {
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        for line in file.read_text("utf-8").splitlines()
        if re.search(r"(?<![\w.])(print|echo|Console)\(|\becho\(|std(out|err)\.write", line)
    }
    assert {line.partition(":")[0] for line in found} == {"restkv/cli/terminal.py", "restkv/cli/console.py"}


# -- help where there was none


def stats(**changes: object) -> Stats:
    made = Stats("restkv", 1024, [5], seen=[8], kept=[[8.0], [8.0]])
    made.live_bytes, made.allocated_bytes, made.full_bytes = 16_600, 266_000, 16_400
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "nothing evicted, all within the budget of 1,024; cache 16.6 kB, in whole pages 266 kB"),
        ({"budget": None, "method": "full"}, "nothing evicted; cache 16.6 kB, in whole pages 266 kB"),
        ({"budget": 1.0}, "nothing evicted, all within the budget of 100%; cache"),
        ({"budget": (64, 32)}, "nothing evicted, all within the budget of 64,32; cache"),
        ({"kept": [[8.0], [4.0]], "live_bytes": 12_300}, "KV head; cache 12.3 kB of 16.4 kB, in whole pages 266 kB"),
        ({"allocated_bytes": 8_200}, "KV head; cache 8.2 kB, full cache 16.4 kB (50% saved)"),
    ],
)
def test_the_summary_of_a_short_prompt_is_no_loss(changes: dict[str, object], expected: str) -> None:
    line = holdings(stats(**changes))
    assert expected in line and re.match(r"\w+: kept \d of 8 entries per KV head", line)


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (["-p", r"Lily\nTom"], ["--prompt"]),
        (["-p", "Lily\\n\nTom"], []),
        (["-p", "Lily\nTom"], []),
        (["-p", "Lily", "--stop", r"\n"], ["--stop"]),
    ],
)
def test_a_backslash_and_an_n_are_remarked(
    rambler: Path, capsys: pytest.CaptureFixture[str], options: list[str], notes: list[str]
) -> None:
    assert main(["generate", str(rambler), "-n", "1", *options]) == 0
    said = re.findall(r"restkv: note: (\S+) has a backslash and an n, .* give \$'one\\ntwo'", capsys.readouterr().err)
    assert said == notes


def test_help_says_how_to_give_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    assert re.search(r"no line break", " ".join(re.findall(r"[^\s│]+", capsys.readouterr().out)))

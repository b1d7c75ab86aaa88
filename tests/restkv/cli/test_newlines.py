"""One text is one text: from a file, from stdin or an option, with whatever ends its lines."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.published.haystack import _essays
from bench.quality import anli, corpus, leval
from modeling.text.characters import decoded
from restkv.cli import main
from restkv.cli.app import _command
from restkv.cli.options import read_text
from restkv.errors import PromptError

LINES = ["Once upon a time", "", "there was a girl", "named Lily."]
ENDS = ["\n", "\r\n", "\r"]
BOM = b"\xef\xbb\xbf"


@given(text=st.text(alphabet=st.sampled_from("ab é\r\n\u2028\x0b\x85"), max_size=12))
def test_line_ends_are_read_as_python_reads_them(text):
    raw = text.encode()
    assert decoded(raw) == io.TextIOWrapper(io.BytesIO(raw), "utf-8").read()
    assert decoded(BOM + raw) == decoded(raw)


@pytest.fixture
def tokens(rambler, capsys, monkeypatch):
    """tokens(*options, stdin=bytes): prompt tokens of `restkv generate`, and those it made."""

    def run(*options: object, stdin: bytes = b"") -> tuple[int, list[int]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "latin-1"))
        assert main(["generate", str(rambler), "-n", "6", "--method", "full", "--json", *map(str, options)]) == 0
        said = json.loads(capsys.readouterr().out)
        return said["stats"]["prompt_tokens"][0], said["tokens"]

    return run


@pytest.mark.parametrize("last", ["", "\n"])
def test_a_prompt_is_the_same_wherever_it_comes_from(last, tokens, tmp_path):
    expected = tokens("-p", "\n".join(LINES))
    file = tmp_path / "prompt.txt"
    for end in ENDS:
        for mark in (b"", BOM):
            raw = mark + (end.join(LINES) + last.replace("\n", end)).encode()
            file.write_bytes(raw)
            assert tokens("--prompt-file", file) == tokens(stdin=raw) == expected
        assert tokens("-p", end.join(LINES)) == expected


def test_a_pipe_gives_a_process_the_same(rambler, tokens):
    """Where the locale says that text is ASCII."""
    raw = "\r\n".join(LINES).encode()
    command = [sys.executable, "-m", "restkv", "generate", str(rambler), "-n", "6", "--method", "full", "--json"]
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    ran = subprocess.run(command, input=raw, capture_output=True, check=True, env={"LC_ALL": "C", **environment})
    said = json.loads(ran.stdout)
    assert (said["stats"]["prompt_tokens"][0], said["tokens"]) == tokens(stdin=raw)


LATIN = "en_US.ISO-8859-1"


@pytest.fixture(scope="module")
def latin(tmp_path_factory) -> dict[str, str]:
    """The environment of somebody whose letters are one byte each."""
    folder = tmp_path_factory.mktemp("locales")
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / LATIN)], capture_output=True, check=False
    )
    if not made or not (folder / LATIN).is_dir():
        pytest.skip("no such locale can be made here")
    return {"LOCPATH": str(folder), "LC_ALL": LATIN, "PYTHONUTF8": "0"}


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_locale(locale: dict[str, str], arguments: list[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "PATH") if name in os.environ}
    command = [os.fsencode(word) for word in (sys.executable, "-m", "restkv")] + [word.encode() for word in arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env={**environment, **locale}, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["ascii", "latin"])
def test_the_command_line_is_utf8_whatever_the_locale_says(which, rambler, tokens, tmp_path, request):
    locale = ASCII if which == "ascii" else request.getfixturevalue("latin")
    expected = tokens("-p", "Tom é Łucja")
    common = ["generate", str(rambler), "-n", "6", "--method", "full", "--json"]
    for words, stdin in ((["-p", "Tom é Łucja"], b""), ([], "Tom é Łucja".encode())):
        ran = in_locale(locale, [*common, *words], stdin)
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        assert (said["stats"]["prompt_tokens"][0], said["tokens"]) == expected
    # Names of files are bytes, from the command line and in a chat.
    saved, model = tmp_path / "été.chat", tmp_path / "modèle"
    model.symlink_to(rambler)
    ran = in_locale(locale, ["chat", str(model), "-n", "3"], f"Tom is\n/save {saved}\n".encode())
    assert ran.returncode == 0 and saved.is_file(), ran.stderr
    ran = in_locale(locale, ["chat", str(model), "-n", "3", "--load", str(saved)], f"/load {saved}\n".encode())
    assert ran.returncode == 0 and b"error" not in ran.stderr


def test_other_texts_are_utf8_whatever_the_locale_says(latin):
    seen = in_locale(latin, ["generate", "-p", "Tom", "--template-arg", "größe=1", "-n", "3"])
    assert seen.returncode == 2 and "größe".encode("latin-1") in seen.stderr


def text_options() -> list[tuple[str, str]]:
    """Every option of every command that takes a text which is no file's name, as it is typed."""
    found = []

    def walk(command: Any, words: str) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{words} {name}")
        for one in () if hasattr(command, "commands") else command.params:
            kind = one.type_descriptor.annotation
            if kind in (str, list[str]) and one.type_descriptor.parameter_info.parser is None:
                long = [name for name in one.opts if name.startswith("--")]
                if long and (words, long[0]) not in FILES:
                    found.append((words, long[0]))

    walk(_command(), "")
    return found


# Those whose texts are names of files, or of checkpoints.
FILES = {
    (" methods", "--bytes"),
    (" bench anli", "--model"),
    (" bench perplexity", "--model"),
    (" bench documents", "--model"),
    (" bench speed", "--peer-python"),
    (" bench memory", "--peer-python"),
    *((f" bench {name}", "--model") for name in ("longbench", "infinitebench", "ruler-official", "needle-official")),
}


@pytest.mark.parametrize(("words", "option"), text_options())
def test_every_text_of_the_command_line_is_refused_where_it_is_no_text(words, option, capsys):
    needed = {"anli", "documents", "longbench", "infinitebench", "ruler-official", "needle-official"} & set(
        words.split()
    )
    arguments = {" fuzz": ["snapkv"], " quantize": ["nowhere", "there"]}
    more = ["--data", "nowhere"] if needed else arguments.get(words, [])
    assert main([*words.split(), *more, option, "a\udcff"]) == 2
    assert capsys.readouterr().err == f"restkv: error: {option}: not UTF-8 text (byte 1); convert it first\n"


@pytest.mark.parametrize("raw", [b"Lily \xff", b"\xff\xfeL\x00"])
def test_bytes_that_are_no_text_are_named(raw, rambler, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_bytes(raw)
    for options, place in (((), "stdin"), (("--prompt-file", str(tmp_path / "prompt")), str(tmp_path))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "latin-1"))
        assert main(["generate", str(rambler), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"restkv: error: {place}") and "not UTF-8 text (byte " in error
    for text in ("Lily \udcff", "Lily \ud800"):
        assert main(["generate", str(rambler), "-p", text]) == 2
        assert "--prompt: not UTF-8 text (byte 5)" in capsys.readouterr().err


def test_chat_lines_lose_their_carriage_return(rambler, capsys, monkeypatch):
    def said(raw: bytes) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "ascii", newline=""))
        assert main(["chat", str(rambler), "-n", "6"]) == 0
        out, err = capsys.readouterr()
        return out, err.rpartition("first token")[0]

    plain = said("Tom is\n/stats\nLily é\n/quit\nnever\n".encode())
    assert plain[0].count("\n") == 2 and "kept" in plain[1]
    assert said("Tom is\r\n/stats\r\nLily é\r\n/quit\r\nnever\r\n".encode()) == plain
    assert said(BOM + "Tom is\r\n/stats\r\nLily é\r\n/quit\r".encode()) == plain
    assert said(b"Tom is\r\r\n")[0] != said(b"Tom is\r\n")[0]  # one, not all


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mark", [b"", BOM])
def test_files_of_benches_are_read_by_the_same_rule(end, mark, tmp_path):
    def write(name: str, lines: list[str]):
        (tmp_path / name).write_bytes(mark + end.join(lines).encode())
        return tmp_path / name

    assert corpus.read_documents(write("a.txt", LINES))[0].text == "\n".join(LINES) == read_text(tmp_path / "a.txt")
    rows = [json.dumps({"page": f"{line}\r\nsecond"}) for line in LINES if line]
    pages = corpus.read_documents(write("b.jsonl", rows))
    assert [page.text for page in pages] == [f"{line}\r\nsecond" for line in LINES if line]  # spelled, not written
    row = {"uid": "1", "premise": "p", "hypothesis": "h", "label": "e"}
    assert len(anli.read_examples(write("c.jsonl", [json.dumps(row)] * 3))) == 3
    asked = {"input": "a\r\nb", "instructions": ["c"], "outputs": ["d"]}
    assert [one.text for one in leval.read_leval(write("e.jsonl", [json.dumps(asked)] * 3))] == ["a\r\nb"] * 3
    (tmp_path / "essays").mkdir()
    write("essays/d.txt", LINES)
    assert _essays(tmp_path / "essays") == ["\n".join(LINES)]


def test_deep_rows_are_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(PromptError, match=r"deep\.jsonl, line 1: not JSON"):
        corpus.read_documents(tmp_path / "deep.jsonl")
    with pytest.raises(PromptError, match=r"deep\.jsonl, line 1: not JSON"):
        anli.read_examples(tmp_path / "deep.jsonl")
    with pytest.raises(PromptError, match=r"deep\.jsonl, line 1: not JSON"):
        leval.read_leval(tmp_path / "deep.jsonl")

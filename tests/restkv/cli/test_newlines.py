"""One text is one text: from a file, from stdin or an option, with whatever ends its lines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.published.haystack import _essays
from bench.quality import anli, corpus
from modeling.text.characters import decoded
from restkv.cli import main
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
    (tmp_path / "essays").mkdir()
    write("essays/d.txt", LINES)
    assert _essays(tmp_path / "essays") == ["\n".join(LINES)]


def test_deep_rows_are_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(PromptError, match=r"deep\.jsonl, line 1: not JSON"):
        corpus.read_documents(tmp_path / "deep.jsonl")
    with pytest.raises(PromptError, match=r"deep\.jsonl, line 1: not JSON"):
        anli.read_examples(tmp_path / "deep.jsonl")

"""Hostile tokenizer files: every panic of `tokenizers` and every bomb is one line, and nothing of it reaches stderr."""

from __future__ import annotations

import copy
import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from make.toy_tokenizers import BYTES, KINDS, TOKENS
from modeling.errors import TokenizerError
from modeling.text.guard import guarded
from modeling.text.tokenizer import Tokenizer

FILES = {kind: json.loads(build().to_str()) for kind, build in KINDS.items()}
TEXTS = ["Once upon a time.", "", "<s> 日本 <|im_end|>", "a" * 40]


def folder_of(where: Path, file: Any, **beside: Any) -> Path:
    contents = {"tokenizer": file, "tokenizer_config": TOKENS} | beside
    for name, content in contents.items():
        (where / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return where


def use(folder: Path) -> None:
    """Everything that is done with a tokenizer."""
    tokenizer = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        tokenizer.ends(text)
        tokenizer.encode_more(text)
        tokenizer.decode(ids)
        stream = tokenizer.stream()
        for token in ids:
            stream.push(token)
        stream.flush()
    assert tokenizer.vocab_size >= 0


def changed(kind: str, **parts: Any) -> dict[str, Any]:
    file = json.loads(json.dumps(FILES[kind]))
    file["model"].update(parts.pop("model", {}))
    return file | parts


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


SPECIAL_PIECE, TEXT_PIECE = {"SpecialToken": {"id": "<zz>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


def template(single: list[Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


BIG = {"content": "<big>", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}
# Files, and a part of the line that refuses them.
BROKEN = {
    "charsmap of no length": (
        changed("metaspace", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json: reading failed in tokenizers",
    ),
    "charsmap that points nowhere": (
        changed("metaspace", normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA8AAAA"}),
        "encoding a text failed in tokenizers",
    ),
    "a post-processor's unknown token": (
        changed("byte_level", post_processor=template([SPECIAL_PIECE, TEXT_PIECE])),
        "the post_processor of tokenizer.json cannot be used",
    ),
    "a regex that backtracks": (
        changed(
            "byte_level",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
        ),
        "encoding a text failed in tokenizers .*retry-limit",
    ),
    "an unknown token that is unknown": (
        changed("byte_fallback", model={"unk_token": "<nope>", "byte_fallback": False}),
        "encoding a text failed in tokenizers .*<nope>",
    ),
    "no unknown token": (
        changed("metaspace", model={"unk_id": None}),
        "encoding a text failed in tokenizers",
    ),
    "an id of 60 bits": (
        changed("byte_level", added_tokens=[{**BIG, "id": 2**60}]),
        "tokenizer.json: unreadable",
    ),
    "a newer library's normalizer": (
        changed("byte_level", normalizer={"type": "Unheard"}),
        r"unreadable .* pip install -U tokenizers",
    ),
    "a newer library's model": (changed("byte_level", model={"type": "Unheard"}), "pip install -U tokenizers"),
    "merges with a prefix": (  # ended the process
        changed("byte_fallback", model={"continuing_subword_prefix": "x"}),
        "its merges have a 'continuing_subword_prefix', which is not supported",
    ),
    "deep lists": (
        '{"normalizer":' + '{"type":"Sequence","normalizers":[' * 100_000,
        "unreadable .*download the file again",
    ),
    "half a file": (json.dumps(FILES["byte_level"])[:-9], "unreadable .*; copy or download the file again"),
    "a space that becomes much": (
        changed("byte_level", normalizer=replacing({"String": " "}, "x" * 300)),
        "its normalizer may make 300 bytes of one",
    ),
    "letters that double": (
        changed("byte_level", normalizer={"type": "Sequence", "normalizers": [replacing({"String": "a"}, "aa")] * 40}),
        "its normalizer may make 1,099,511,627,776 bytes of one",
    ),
    "a decoder that explodes": (
        changed("byte_level", decoder={"type": "Sequence", "decoders": [replacing({"Regex": ""}, "aaa")] * 30}),
        "its decoder may make",
    ),
    "a token of a megabyte": (
        changed("byte_level", model={"vocab": FILES["byte_level"]["model"]["vocab"] | {"z" * 1_000_000: 999}}),
        "holds a token of 1,000,000 characters",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_one_line_and_says_nothing_else(name, tmp_path, capfd):
    file, text = BROKEN[name]
    begun = time.monotonic()
    with pytest.raises(TokenizerError, match=text) as caught:
        use(folder_of(tmp_path, file))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 800
    assert time.monotonic() - begun < 10
    assert capfd.readouterr() == ("", "")


def test_files_that_are_too_large_are_not_read(tmp_path):
    folder = folder_of(tmp_path, FILES["byte_level"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(5 << 30)  # sparse
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: has 5,120 MB"):
        Tokenizer.from_folder(folder)
    merges = ",".join(['["a","b"]'] * 2_000_000)
    folder_of(tmp_path, '{"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[' + merges + "]}}")
    del merges
    with pytest.raises(TokenizerError, match="holds over 3,000,000 values"):
        Tokenizer.from_folder(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


BESIDE = {
    "tokenizer_config": {"bos_token": 5},
    "special_tokens_map": {"eos_token": {"content": 3}},
    "added_tokens": {"<x>": "one"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_impossible_entries_are_named(name, tmp_path):
    with pytest.raises(TokenizerError, match=r"'(bos_token|eos_token|added_tokens\.json)' of the tokenizer's files is"):
        Tokenizer.from_folder(folder_of(tmp_path, FILES["byte_level"], **{name: BESIDE[name]}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class 'T5Tokenizer' is not known .*TokenizersBackend"),
        ({"tokenizer_class": 3}, "'tokenizer_class' is 3"),
        ({"split_special_tokens": "yes"}, "'split_special_tokens' of the tokenizer's files is 'yes'"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "must name tokens by their ids"),
        ({"added_tokens_decoder": {"7": "y"}}, "'added_tokens_decoder 7' .* must be an object"),
        ({"added_tokens_decoder": {"8": 3}}, "'added_tokens_decoder 8'"),
        ({"added_tokens_decoder": []}, "must be an object"),
        ({"extra_special_tokens": "a"}, "'extra_special_tokens' .* must be a list of tokens"),
        ({"extra_special_tokens": [4]}, "'extra_special_tokens' .* must be a token"),
        ({"eos_token": {"content": "x", "lstrip": 4}}, "'eos_token' .* must have true or false"),
    ],
)
def test_impossible_settings_are_named(settings, text, tmp_path):
    with pytest.raises(TokenizerError, match=text) as caught:
        Tokenizer.from_folder(folder_of(tmp_path, FILES["byte_level"], tokenizer_config=settings))
    assert "\n" not in str(caught.value)


# -- the guard


def test_a_guard_lets_interrupts_through():
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), guarded("place", "testing"):
            raise kind
    assert os.fstat(2)


def test_what_others_write_meanwhile_is_not_lost(capfd):
    with guarded("place", "testing"):
        os.write(2, b"from another thread\n")
    assert capfd.readouterr().err == "from another thread\n"
    with (
        pytest.raises(TokenizerError, match=r"place: testing failed in tokenizers \(.*\); download"),
        guarded("place", "testing"),
    ):
        tokenizers.Tokenizer.from_str(json.dumps(BROKEN["charsmap of no length"][0]))
    assert capfd.readouterr().err == ""


def test_guards_of_many_threads(capfd, tmp_path):
    """Errors are errors in every thread, and stderr is where it was."""
    folder = folder_of(tmp_path, BROKEN["charsmap that points nowhere"][0])
    failures = []

    def work() -> None:
        for _ in range(30):
            try:
                Tokenizer.from_folder(folder).encode("some text")
            except TokenizerError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 120
    capfd.readouterr()
    os.write(2, b"here\n")
    assert capfd.readouterr().err == "here\n"


def test_there_may_be_no_stderr(tmp_path):
    folder, usual = folder_of(tmp_path, FILES["byte_level"]), os.dup(2)
    os.close(2)
    try:
        assert Tokenizer.from_folder(folder).encode("Once")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    finally:
        os.dup2(usual, 2)
        os.close(usual)


# -- random damage

values: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, 2**31, 2**63, 1e300, "", "x", [], {}, True, [[]], BYTES[:3]]
)


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A valid tokenizer.json with values changed somewhere outside of its vocabulary."""
    file = json.loads(json.dumps(FILES[draw(st.sampled_from(sorted(FILES)))]))
    for _ in range(draw(st.integers(1, 3))):
        at: Any = file
        while True:
            keys = list(range(len(at))) if isinstance(at, list) else sorted(key for key in at if key != "vocab")
            if not keys:
                break
            key = draw(st.sampled_from(keys[:40]))
            if not isinstance(at[key], dict | list) or draw(st.integers(0, 3)) == 0:
                at[key] = copy.deepcopy(draw(values))
                break
            at = at[key]
    return file


def check_damaged(file: dict[str, Any], folder: Path) -> None:
    try:
        use(folder_of(folder, file))
    except TokenizerError as error:
        assert "\n" not in str(error) and len(str(error)) < 800


@given(file=damaged())
@settings(max_examples=many(100, 2))
def test_damaged_files_work_or_are_refused(file, tmp_path_factory):
    check_damaged(file, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@given(file=damaged())
@settings(max_examples=many(5000, 10))
def test_damaged_files_work_or_are_refused_at_length(file, tmp_path_factory):
    check_damaged(file, tmp_path_factory.getbasetemp())

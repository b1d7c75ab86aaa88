"""Special and added tokens of folders with any side files: ids, names and what is hidden as in AutoTokenizer."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from make.toy_tokenizers import KINDS, SPECIAL
from modeling.errors import TokenizerError
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL

NEW = ["<extra>", "[NEW]", "word", "\n\n"]  # in no vocabulary
NAMES = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
SPECIFIC = ["image_token", "boi_token"]
CLASSES = ["LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "CodeLlamaTokenizer"]
PLAIN = ["PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", None]
TYPES = ["llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"]


def made(kind: str) -> dict[str, Any]:
    """A tokenizer.json."""
    return json.loads(RECALL.joinpath("tokenizer.json").read_text() if kind == "recall" else KINDS[kind]().to_str())


FILES = {kind: made(kind) for kind in (*KINDS, "recall")}
words = st.sampled_from([*SPECIAL, *NEW, "a", "<|end|>"])
flags = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), st.booleans())
)


def entry(typed: bool) -> st.SearchStrategy[Any]:
    """A special token: text, or an object."""
    mark = {"__type": "AddedToken"} if typed else {}
    return words | st.builds(lambda word, more: {"content": word, **more, **mark}, words, flags)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """The files of a folder: their names with what JSON they hold."""
    file = json.loads(json.dumps(FILES[draw(st.sampled_from([*FILES, "byte_fallback", "byte_level"]))]))
    for token in file["added_tokens"]:
        token.update(draw(flags | st.just({})))
    top = max(file["model"]["vocab"].values()) if isinstance(file["model"]["vocab"], dict) else 0
    top = max(top, len(file["model"]["vocab"]) - 1, *(token["id"] for token in file["added_tokens"]))
    for word in draw(st.lists(st.sampled_from(NEW), max_size=2, unique=True)):
        top += 1
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        file["added_tokens"].append({"id": top, "content": word, **plain, **draw(flags)})
    if draw(st.booleans()):
        file["post_processor"] = None
    if draw(st.integers(0, 4)) == 0:
        file["padding"] = {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": draw(words),
        }
    config = draw(
        st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys(NAMES, st.none() | entry(typed=True)),
                **dict.fromkeys(SPECIFIC, entry(typed=True)),
                "additional_special_tokens": st.none() | st.lists(words | entry(typed=True), max_size=3),
                "extra_special_tokens": st.none()
                | st.lists(words | entry(typed=True), max_size=3)
                | st.dictionaries(st.sampled_from([*SPECIFIC, "eos_token"]), words, max_size=2),
                "added_tokens_decoder": st.dictionaries(
                    st.integers(0, top + 3).map(str),
                    entry(typed=False).filter(lambda one: not isinstance(one, str)),
                    max_size=4,
                ),
                **dict.fromkeys(("add_bos_token", "add_eos_token", "split_special_tokens"), st.booleans()),
                **dict.fromkeys(("add_prefix_space", "legacy"), st.none() | st.booleans()),
                "clean_up_tokenization_spaces": st.booleans(),
                "tokenizer_class": st.sampled_from(
                    [*CLASSES, CLASSES[0], *(f"{name}Fast" for name in CLASSES[:4]), *PLAIN]
                ),
                "model_max_length": st.just(10**30),
            },
        )
    )
    special_map = draw(
        st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys([*NAMES, *SPECIFIC], entry(typed=False)),
                "additional_special_tokens": st.lists(words, max_size=3),
                "extra_special_tokens": st.lists(words | entry(typed=False), max_size=2),
            },
        )
    )
    added = draw(st.dictionaries(words, st.integers(0, top + 5), max_size=3))
    model = {
        "model_type": draw(st.sampled_from(TYPES)),
        **draw(st.sampled_from([{}, {"tokenizer_class": "GPT2Tokenizer"}])),
    }
    files = {"tokenizer.json": file}
    beside = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": special_map,
        "added_tokens.json": added,
        "config.json": model,
    }
    return Files(files | {name: beside[name] for name in sorted(beside) if draw(st.integers(0, 3))})


class Files(dict[str, Any]):
    """Contents of files by name; a vocabulary is not shown when a test fails."""

    def __repr__(self) -> str:
        head = {key: value for key, value in self["tokenizer.json"].items() if key != "model"}
        return repr({**self, "tokenizer.json": head, "model": self["tokenizer.json"]["model"]["type"]})


def written(files: dict[str, Any], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


TEXTS = [
    "Once upon a time 1234, café.",
    "<s> hello <|im_start|>  a</s>b <extra>[NEW] wordword a word",
    " two  spaces\n\nand <unk>日本 \t<|im_end|>\n",
    "",
    "a",
]


def compare(folder: Path) -> None:
    """Fails where our tokenizer of a folder differs from AutoTokenizer's; one that AutoTokenizer refuses we may refuse too."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        wanted = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    except BaseException as error:
        assert isinstance(error, Exception) or type(error).__name__ == "PanicException", error
        try:
            ours = Tokenizer.from_folder(folder)
            for text in TEXTS:
                ours.encode(text)
        except TokenizerError as refusal:
            assert "\n" not in str(refusal)
        return
    try:
        ours = Tokenizer.from_folder(folder)
    except TokenizerError as refusal:  # AutoTokenizer makes a BPE model without merges of it, which spells nothing
        assert "needs a BPE model" in str(refusal) and "\n" not in str(refusal)
        return
    assert type(theirs).__name__ in (*CLASSES, "TokenizersBackend")
    assert [ours.encode(text, bos=False) for text in TEXTS] == wanted
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_ids) == (
        theirs.bos_token_id,
        () if theirs.eos_token_id is None else (theirs.eos_token_id,),
    )
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    if ours.bos_id is None or wanted[0][:1] != [ours.bos_id]:
        assert ours.encode(TEXTS[0]) == theirs(TEXTS[0])["input_ids"]
    ids = [*wanted[0], *sorted(theirs.added_tokens_decoder), *wanted[2]]
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    hidden = [i for i in theirs.added_tokens_decoder if ours.spelling(i) is None]
    assert theirs.decode(hidden, skip_special_tokens=True) == ""


@given(files=folders())
@settings(max_examples=60)
def test_any_side_files_give_what_autotokenizer_gives(files):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        compare(written(files, Path(folder)))


@pytest.mark.slow
@given(files=folders())
@settings(max_examples=many(10_000, 10))
def test_any_side_files_give_what_autotokenizer_gives_at_length(files):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        compare(written(files, Path(folder)))


def test_an_id_that_two_files_give_hides_neither_of_their_tokens():
    """added_tokens.json says how [NEW] is met, although tokenizer.json gives its id to <unk>."""
    files = {
        "tokenizer.json": FILES["byte_level"],
        "added_tokens.json": {"[NEW]": 0},
        "special_tokens_map.json": {"eos_token": {"content": "[NEW]", "rstrip": True, "normalized": False}},
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        compare(written(Files(files), Path(folder)))

"""Saved contexts and chats that somebody has altered and signed anew: each one works, or is refused in one line.

tests/restkv/test_context.py has what damage does without a new signature.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import restkv
from make.effort import many
from make.hostile import alter_remarks, fits
from make.small import VOCAB, small_ids, small_model
from restkv.chat import Chat
from restkv.cli.options import RECALL
from restkv.context import CompressedContext
from restkv.errors import OutputError, PolicyError, PromptError
from restkv.lm import LM
from restkv.policies import H2O, FullCache, LaCache, Random, ReSTKV, SnapKV, StreamingLLM
from restkv.saving import archive
from restkv.saving.archive import opened, write_archive

POLICIES = {
    "restkv": ReSTKV(20, window=4, interval=8),
    "restkv global joint": ReSTKV(20, window=4, interval=8, gqa="joint", budget_by="global"),
    "restkv query": ReSTKV(20, window=4, interval=8, granularity="query"),
    "snapkv layers": SnapKV((12, 20, 28, 12), window=4, interval=8),
    "part": ReSTKV(0.3, window=4, interval=8, protect=((5, 9),)),
    "h2o": H2O(20, interval=8),
    "streamingllm": StreamingLLM(20, interval=4),
    "lacache": LaCache(20),
    "random": Random(20, interval=8),
    "full": FullCache(),
}
Saved = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(small_model(4, windows=(None,) * 4), None)


@pytest.fixture(scope="module")
def talker(rambler: Path) -> LM:
    return restkv.load(rambler)


def content(path: Path) -> Saved:
    """The remarks and the tensors of a file."""
    with opened(path) as file:
        return file.remarks, {name: file.read(name) for name in file.places}


def sign(path: Path, saved: Saved) -> None:
    """Write it as if it had been saved like this."""
    write_archive(path, json.dumps(saved[0]), saved[1])


@pytest.fixture(scope="module")
def contexts(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    path = tmp_path_factory.mktemp("saved") / "context"
    found = {}
    for name, policy in POLICIES.items():
        lm.compress(small_ids(70, 1), policy).save(path)
        found[name] = content(path)
    return found


@pytest.fixture(scope="module")
def chat(talker: LM, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp("saved") / "chat"
    talk = Chat(talker, ReSTKV(48, window=4), "Be kind.", template=False)
    for _ in talk.send("Tom and Lily went to the park.", max_new_tokens=6):
        pass
    talk.save(path)
    return content(path)


# -- altered anyhow


def alter_tensors(draw: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> None:
    """Another tensor in the place of one, or one more or fewer."""
    name = draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    how = draw(st.sampled_from(["gone", "more", "dtype", "longer", "shorter", "shape", "values", "value", "order"]))
    if how == "gone":
        del tensors[name]
    elif how == "more":
        tensors[draw(st.sampled_from(["x", "k.99", "k.", "state.0.x", "queries.7", "mass.0", "raw.0"]))] = value.clone()
    elif how == "dtype":
        other = draw(
            st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
        )
        tensors[name] = value.to(other)
    elif how == "longer":
        tensors[name] = torch.cat([value, value[-1:]])
    elif how == "shorter":
        tensors[name] = value[:-1].contiguous()
    elif how == "shape":
        tensors[name] = value[None]
    elif how == "order":
        tensors[name] = value.flip(0)
    elif value.numel():
        numbers = [-1.0, 0.0, 1e30, math.nan, math.inf] if value.is_floating_point() else [-1, 0, 1, 2**31 - 1, 100]
        numbers = [number for number in numbers if fits(number, value.dtype)]
        number = draw(st.sampled_from(numbers))
        value = value.clone()
        (value if how == "values" else value.view(-1)[draw(st.integers(0, value.numel() - 1)) :][:1]).fill_(number)
        tensors[name] = value


def altered(draw: Callable[..., Any], saved: Saved) -> Saved:
    remarks, tensors = copy.deepcopy(saved[0]), dict(saved[1])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if draw(st.integers(0, 2)) and tensors:
            remarks = alter_remarks(draw, remarks)
        elif tensors:
            alter_tensors(draw, tensors)
    return remarks, tensors


def one_line(path: Path, error: PromptError) -> None:
    text = str(error)
    assert text.startswith(f"{path}: ") and len(text) < 1000 and text.isprintable(), text


def check_context(path: Path, lm: LM) -> None:
    try:
        loaded = CompressedContext.load(path, lm)
    except PromptError as error:
        one_line(path, error)
        event(str(error).removeprefix(f"{path}: ")[:60])
        return
    event("works")
    assert loaded._session.cache.reserved_bytes < 70e6 + 10 * path.stat().st_size
    try:
        answer = loaded.ask(small_ids(5, 2), max_new_tokens=12)
    except PolicyError as error:  # spans to come are protected, and do not fit once they are there
        assert "protected entries" in str(error) and str(error).isprintable()
        return
    assert len(answer.tokens) == 12 and all(0 <= token < VOCAB for token in answer.tokens)


def check_chat(path: Path, lm: LM) -> None:
    try:
        loaded = Chat.load(path, lm)
    except PromptError as error:
        one_line(path, error)
        return
    for _ in loaded.send("And then?", max_new_tokens=3):
        pass
    assert loaded.messages[-2] == {"role": "user", "content": "And then?"}


FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)))
def test_an_altered_context_works_or_is_refused(data, name, lm, contexts, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered"
    sign(path, altered(data.draw, contexts[name]))
    check_context(path, lm)


@settings(FEW, max_examples=30)
@given(data=st.data())
def test_an_altered_chat_works_or_is_refused(data, talker, chat, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered-chat"
    sign(path, altered(data.draw, chat))
    check_chat(path, talker)


@pytest.mark.slow
@settings(FEW, max_examples=many(5000, 10))
@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)))
def test_thousands_of_altered_contexts(data, name, lm, contexts, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered-often"
    sign(path, altered(data.draw, contexts[name]))
    check_context(path, lm)


# -- altered in ways that matter


def refusal(path: Path, lm: LM) -> str:
    with pytest.raises(PromptError) as error:
        CompressedContext.load(path, lm)
    one_line(path, error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["restkv", "h2o", "restkv query", "full", "lacache"])
def test_a_file_does_not_say_how_much_memory_is_taken(name, lm, contexts, tmp_path):
    """It is what the file holds that memory is taken for, and a page for every list."""
    path = tmp_path / "context"
    for change in (
        {"budget": 2 * 10**9},
        {"budget": 2 * 10**9, "window": 10**9},
        {"interval": 10**9},
        {"high_water": 2 * 10**9},
    ):
        remarks, tensors = copy.deepcopy(contexts[name])
        remarks["policy"] |= {key: value for key, value in change.items() if name != "full"}
        remarks["session"]["job"] |= {"max_new_tokens": 2**31 - 1, "forks": 1000}
        sign(path, (remarks, tensors))
        try:
            loaded = CompressedContext.load(path, lm)
        except PromptError as error:
            one_line(path, error)
            continue
        held = sum(tensor.nbytes for tensor in tensors.values())
        lists = 4 * 2  # layers, KV heads
        assert loaded._session.cache.reserved_bytes < 8 * held + lists * 3 * 128 * 200
        assert loaded.kept == [len(tensors[f"pos.{layer}"]) / 2 for layer in range(4)]
        assert len(loaded.ask(small_ids(5, 2), max_new_tokens=20).tokens) == 20


TENSORS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a position twice": ("restkv", lambda t: t["pos.1"].__setitem__(1, t["pos.1"][0]), "pos.1 is in disorder"),
    "a position to come": ("restkv", lambda t: t["pos.1"].__setitem__(-1, 70), "pos.1 has positions that the text has not"),
    "fewer than none": ("restkv", lambda t: t["count.0"].copy_(torch.tensor([-1, 41])), "count.0 counts fewer than no"),
    "a huge count": ("restkv", lambda t: t["count.0"].fill_(2**62), "count.0 does not add up to"),
    "no position": ("restkv", lambda t: t["next_pos"].fill_(0), "next_pos is 0"),
    "a late position": ("restkv", lambda t: t["next_pos"].fill_(2**31 - 1), "next_pos is 2147483647"),
    "a lag": ("restkv", lambda t: t["lag"].fill_(3), "lag is not what follows"),
    "another lag": ("streamingllm", lambda t: t["lag"].fill_(3), "lag is not what follows"),
    "counted ahead": ("h2o", lambda t: t["counted"].fill_(71), "counted is not within the text"),
    "negative attention": ("h2o", lambda t: t["mass.0"].fill_(-1), "mass.0 has less than no attention"),
    "NaN": ("restkv", lambda t: t["v.3"].view(-1)[5:6].fill_(torch.nan), "v.3 has numbers that are not finite"),
    "infinite logits": ("restkv", lambda t: t["logits"].fill_(torch.inf), "logits has numbers that are not finite"),
    "ladders nowhere": ("lacache", lambda t: t["state.0.at"].fill_(-5), "lacache cannot remember"),
    "a tensor gone": ("lacache", lambda t: t.pop("raw.2"), "it lacks tensor 'raw.2'"),
    "a tensor of another policy": ("restkv", lambda t: t.update(mass=torch.ones(1)), "it has a needless tensor 'mass'"),
    "no queries": ("restkv", lambda t: [t.pop(f"queries.{layer}") for layer in range(4)], "0 queries are remembered"),
    "half a head": ("full", lambda t: t.update({"k.1": t["k.1"][:, :4].contiguous()}), "tensor k.1 is torch.float32 [140, 4]"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_contradict_model_policy_or_one_another(name, change, words, lm, contexts, tmp_path):
    remarks, tensors = contexts[name]
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    sign(tmp_path / "context", (remarks, tensors))
    assert words in refusal(tmp_path / "context", lm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [10**6]}, "a token of the chat is 1000000"),
        ({"tokens": [3.0]}, "a token of the chat is 3.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message is {'role': 'user', 'content': 3}"),
        ({"messages": [{"role": "root", "content": "x"}]}, "a message is"),
        ({"messages": {}}, "messages and tokens are no lists"),
        ({"template": 1}, "template is 1"),
        ({"reading": {"prefill": "dense"}}, "has not the parts prefill, chunk"),
        ({"reading": {"prefill": "lasagne", "chunk": 8}}, "lasagne"),
        ({"spared": 10**9}, "spared is 1000000000"),
        ({"kind": "letter"}, "it is 'letter', not a chat"),
    ],
)
def test_remarks_that_are_no_chat(change, words, talker, chat, tmp_path):
    remarks = copy.deepcopy(chat[0])
    remarks["about"] |= change
    sign(tmp_path / "chat", (remarks, chat[1]))
    with pytest.raises(PromptError) as error:
        Chat.load(tmp_path / "chat", talker)
    one_line(tmp_path / "chat", error.value)
    assert words in str(error.value)


# -- not signed anew


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The same bytes under another header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def swap(header: dict[str, Any]) -> None:
    header["k.0"], header["v.0"] = header["v.0"], header["k.0"]


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "names": swap,
    "a dtype": lambda header: header["k.1"].update(dtype="I32"),
    "a shape": lambda header: header["k.1"].update(shape=header["k.1"]["shape"][::-1]),
    "a digest": lambda header: header["__metadata__"].update(
        digests=header["__metadata__"]["digests"].replace("k.0", "k.1")
    ),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_names_dtypes_and_shapes_are_covered_by_the_digest(change, lm, contexts, tmp_path):
    sign(tmp_path / "context", contexts["full"])
    rewritten(tmp_path / "context", change)
    assert "damaged since it was saved" in refusal(tmp_path / "context", lm)


@pytest.mark.parametrize("before", [1, 2])
def test_formats_before_are_refused_in_one_line(before, lm, contexts, tmp_path):
    path = tmp_path / "context"
    sign(path, contexts["full"])
    labels = {1: {"about": "{}", "checksum": "00000000"}, 2: {"about": "{}", "digests": "{}", "digest": "00"}}
    save_file(load_file(path), path, {"restkv": str(before), **labels[before]})
    assert f"has format '{before}', this version of restkv reads 3; save it again" in refusal(path, lm)


def test_a_saved_file_is_one_that_safetensors_reads(contexts, tmp_path):
    for name, saved in contexts.items():
        sign(tmp_path / name, saved)
        found = load_file(tmp_path / name)
        assert found.keys() == saved[1].keys()
        assert all(torch.equal(found[key], value) for key, value in saved[1].items())


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def wrote(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def to_itself(path: Path) -> Path:
    path.symlink_to(path)
    return path


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a model": (lambda path: RECALL / "model.safetensors", "not written by restkv"),
    "a picture": (lambda path: wrote(path, b"\x89PNG\r\n\x1a\n" + bytes(100)), "cannot be read as a saved context"),
    "nothing": (lambda path: wrote(path, b""), "it is empty"),
    "a pipe": (fifo, "is no regular file"),
    "a device": (lambda path: Path("/dev/zero"), "is no regular file"),
    "a folder": (lambda path: path.parent, "is a folder"),
    "a pointer": (lambda path: wrote(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "Git LFS"),
    "a deep header": (lambda path: wrote(path, (20000).to_bytes(8, "little") + b"[" * 10000 + b"]" * 10000), "no JSON"),
    "a header of 28 GB": (
        lambda path: wrote(path, (28 << 30).to_bytes(8, "little") + bytes(100)),
        "length of a header",
    ),
    "a long name": (lambda path: path.with_name("n" * 300), "File name too long"),
    "a loop": (to_itself, "Too many levels"),
}


@pytest.mark.parametrize(("make", "words"), FOREIGN.values(), ids=FOREIGN)
def test_other_files_are_named(make, words, lm, tmp_path):
    assert words in refusal(make(tmp_path / "file"), lm)


def test_a_name_that_no_file_has_is_one_line(lm):
    for name in ("a\0b", "half \ud800"):
        with pytest.raises(PromptError, match="no file can have this name") as error:
            CompressedContext.load(name, lm)
        assert str(error.value).isprintable()
        with pytest.raises(OutputError, match="no file can have this name"):
            lm.compress(small_ids(9), FullCache()).save(name)


@pytest.mark.parametrize("size", [-1, 1, 5000])
def test_a_file_of_another_size_than_its_header_says(size, lm, contexts, tmp_path):
    path = tmp_path / "context"
    sign(path, contexts["full"])
    os.truncate(path, path.stat().st_size + size)
    assert "its header tells of" in refusal(path, lm)


def test_a_file_that_shrinks_while_it_is_read(contexts, tmp_path):
    path = tmp_path / "context"
    sign(path, contexts["full"])
    with opened(path) as file:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(PromptError, match="became shorter while it was read"):
            [file.read(name) for name in file.places]


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(contexts, tmp_path):
    path = tmp_path / "context"
    sign(path, contexts["full"])
    with opened(path) as file:
        sign(path, contexts["h2o"])
        assert all(torch.equal(file.read(name), value) for name, value in contexts["full"][1].items())
    assert content(path)[0] == contexts["h2o"][0]


def test_what_no_reader_would_take_is_not_written(contexts, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_HEADER", 1000)
    with pytest.raises(OutputError, match="cannot be written \\(what was said takes"):
        sign(tmp_path / "context", contexts["full"])
    assert not list(tmp_path.iterdir())

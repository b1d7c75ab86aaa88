"""Safetensors files as we read them: like the library where it reads them, refused where it refuses them, never mapped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from make.places import ROOT
from modeling.checkpoint.tensor_file import BITS, HEADER_LIMIT, STORED_DTYPES, StoredTensor, read_header, read_pieces
from modeling.errors import CheckpointError

FLOATS = list(STORED_DTYPES.values())


def raw(header: object, tensors: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header (JSON, or bytes as they are) and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tensors


def entry(shape: list[Any], first: int, last: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def whole(tensor: StoredTensor, chunk_bytes: int) -> torch.Tensor:
    """A tensor put together from its pieces."""
    flat = torch.empty(torch.Size(tensor.shape).numel(), dtype=STORED_DTYPES[tensor.dtype])
    for place, piece in read_pieces(tensor, chunk_bytes):
        assert 0 < piece.nbytes <= max(chunk_bytes, piece.itemsize)
        flat[place] = piece
    return flat.view(tensor.shape)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
    return {f"t{i}": torch.randn(shape).to(draw(st.sampled_from(FLOATS))) for i, shape in enumerate(shapes)}


@given(tensors(), st.integers(1, 40), st.none() | st.just({"format": "pt"}))
def test_what_the_library_wrote_is_read_bit_for_bit(tmp_path_factory, stored, chunk_bytes, metadata):
    file = tmp_path_factory.mktemp("written") / "model.safetensors"
    save_file(stored, file, metadata)
    found = {tensor.name: tensor for tensor in read_header(file)}
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert tensor.shape == tuple(stored[name].shape)
        assert torch.equal(whole(tensor, chunk_bytes), stored[name])


GOOD = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3)})


@given(st.data())
def test_whatever_is_changed_we_refuse_what_the_library_refuses(tmp_path_factory, data):
    """Stricter is fine (a header of 100 MB, a name twice), laxer is not; and nothing but one kind of error."""
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "double", "digit"]))
        if kind == "set":
            changed[place] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            changed[place] = data.draw(st.sampled_from(b'0123456789[]{},:"-. '))
        elif kind == "cut":
            del changed[place : place + data.draw(st.integers(1, 9))]
        else:
            changed[place:place] = changed[place : place + data.draw(st.integers(1, 9))]
        if not changed:
            break
    file = tmp_path_factory.mktemp("changed") / "model.safetensors"
    file.write_bytes(changed)
    try:
        with safe_open(file, "pt") as content:
            theirs = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        theirs = None
    try:
        found = read_header(file)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    known = all(tensor.dtype in BITS for tensor in found)  # others are refused beside config.json, by their names
    assert not known or {tensor.name: tensor.shape for tensor in found} == theirs


BROKEN = {
    "nothing": (b"", "it has 0 bytes"),
    "seven bytes": (b"1234567", "it has 7 bytes"),
    "28 GB of header": (raw(b"{}", length=28 << 30), "header would have 30,064,771,072 bytes"),
    "all ones": (b"\xff" * 100, "header would have 18,446,744,073,709,551,615 bytes"),
    "a large header": (raw(b" " * (HEADER_LIMIT + 1)), "at most"),
    "no JSON": (raw(b"{"), "no JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "no JSON"),
    "deep": (raw(b'{"a":' * 100_000), "no JSON"),
    "a long number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
    "a list": (raw([]), "no JSON object"),
    "an entry of text": (raw({"a": "b"}), "a lacks a dtype, a shape or its data_offsets"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}), "a lacks"),
    "one offset": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "a lacks"),
    "a size of text": (raw({"a": entry(["1"], 0, 4)}, bytes(4)), "a lacks"),
    "a size that is true": (raw({"a": entry([True], 0, 4)}, bytes(4)), "a lacks"),
    "a size of a fraction": (raw({"a": entry([1.0], 0, 4)}, bytes(4)), "a lacks"),
    "a size below nothing": (raw({"a": entry([-1, -1], 0, 4)}, bytes(4)), "a lacks"),
    "a huge size": (raw({"a": entry([2**63], 0, 4)}, bytes(4)), "a lacks"),
    "huge sizes": (raw({"a": entry([2**62] * 100_000, 0, 4)}, bytes(4)), "a would have"),
    "huge sizes and none": (raw({"a": entry([2**62, 2**62, 0], 0, 0)}), "a would have"),
    "too few bytes": (raw({"a": entry([2], 0, 4)}, bytes(4)), "a has 4 bytes for F32 [2]"),
    "too many bytes": (raw({"a": entry([1], 0, 8)}, bytes(8)), "a has 8 bytes"),
    "backwards": (raw({"a": entry([1], 4, 0)}, bytes(4)), "a has -4 bytes"),
    "behind the end": (raw({"a": entry([2], 0, 8)}, bytes(4)), "tensors end at byte"),
    "bytes too many": (raw({"a": entry([1], 0, 4)}, bytes(5)), "tensors end at byte"),
    "a gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "b begins at byte 8"),
    "an overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "b begins at byte 4"),
    "a late beginning": (raw({"a": entry([1], 4, 8)}, bytes(8)), "a begins at byte 4"),
    "a long name": (raw({"n" * 10**6: entry([2], 0, 4)}, bytes(4)), "nnn..."),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_at_once(kind, tmp_path):
    content, words = BROKEN[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert words in message and "no complete safetensors file" in message and "download it again" in message
    assert "\n" not in message and len(message) < 400 and message.count(str(file)) == 1
    assert time.monotonic() - start < 2
    with pytest.raises((SafetensorError, OSError)):
        safe_open(file, "pt").__enter__()


def test_remarks_in_the_header_and_dtypes_of_no_weights_are_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"i": torch.ones(3, dtype=torch.int8), "e": torch.ones(2, dtype=torch.float8_e4m3fn)}, file, {"a": "b"})
    assert {(t.name, t.dtype, t.shape) for t in read_header(file)} == {("i", "I8", (3,)), ("e", "F8_E4M3", (2,))}
    file.write_bytes(raw({"q": entry([3], 0, 7, "Q4_NEW")}, bytes(7)))
    assert [tensor.dtype for tensor in read_header(file)] == ["Q4_NEW"]


def test_a_file_that_shrinks_or_vanishes_while_it_is_read_is_one_line(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    (tensor,) = read_header(file)
    os.truncate(file, tensor.start + 2000)
    with pytest.raises(CheckpointError, match="it ends too early"):
        whole(tensor, 400)
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file or directory"):
        whole(tensor, 400)


def test_a_header_in_front_of_more_than_the_memory_is_read_at_once(tmp_path):
    """A sparse file of 64 TB, which no machine can map."""
    file = tmp_path / "model.safetensors"
    count = 1 << 44
    file.write_bytes(raw({"a": entry([count], 0, 4 * count)}))
    header = file.stat().st_size
    try:
        os.truncate(file, header + 4 * count)
    except OSError:
        count = 1 << 41  # the largest file that some file systems have
        file.write_bytes(raw({"a": entry([count], 0, 4 * count)}))
        header = file.stat().st_size
        os.truncate(file, header + 4 * count)
    start = time.monotonic()
    assert read_header(file) == [StoredTensor("a", file, (count,), "F32", header)]
    last = StoredTensor("a", file, (10,), "F32", header + 4 * (count - 10))
    assert torch.equal(whole(last, 16), torch.zeros(10))
    assert time.monotonic() - start < 1


WITHIN = """
    import json, resource, sys
    import torch
    from modeling.checkpoint.loading import load_model, load_outline, tensor_slots

    small, large, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    load_model(small)  # what a first load imports and allocates once
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))  # as ulimit -v does
    assert load_outline(large).config.hidden_size == 512
    model = load_model(large, dtype=torch.bfloat16)
    print(sum(p.nbytes for p in model.parameters()), model.norm.weight[0].item())
    try:
        load_model(large, dtype=torch.float64)
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_file_larger_than_the_address_space_is_inspected_and_loaded(tiny, tmp_path):
    """Stored in float64, four times as large as what it is loaded as."""
    config = json.loads((tiny("llama2").folder / "config.json").read_text())
    config |= {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer: dict[str, tuple[int, ...]] = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (512, 512))
    layer |= {"mlp.down_proj": (512, 1024)}
    layer |= {"mlp.gate_proj": (1024, 512), "mlp.up_proj": (1024, 512)}
    layer |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(4) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (16_000, 512), "lm_head.weight": (16_000, 512), "model.norm.weight": (512,)}
    header, place = {}, 0
    for name, shape in sorted(shapes.items(), key=lambda item: item[0] == "model.norm.weight"):  # the norm comes last
        last = place + 8 * torch.Size(shape).numel()
        header[name], place = entry(list(shape), place, last, "F64"), last
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(raw(header))
        file.seek(place - 8 * 512, os.SEEK_CUR)  # zeros that take no room on the disk
        file.write(torch.full((512,), 3.0, dtype=torch.float64).numpy().tobytes())
    limit = 128 << 20
    assert place > 1.6 * limit
    arguments = [sys.executable, "-c", textwrap.dedent(WITHIN), str(tiny("llama2").folder), str(tmp_path), str(limit)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    sizes, refusal = done.stdout.splitlines()
    assert sizes == f"{place // 4} 3.0"
    assert "the weights take 0.2 GB as float64" in refusal and "narrower dtype" in refusal

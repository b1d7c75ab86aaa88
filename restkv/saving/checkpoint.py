"""A quantised checkpoint on disk: a folder in Hugging Face's shape, which `restkv.load` opens without being told."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modeling.checkpoint.expected import SCALES, expected_tensors
from modeling.checkpoint.folders import ADAPTER_FILES, CONFIG, INDEX, SINGLE
from modeling.checkpoint.loading import Rows, load_model, resolve, weight_slots
from modeling.config import quantization_config, read_json
from modeling.layers import Decoder
from modeling.quant import require_operators
from restkv.errors import OutputError
from restkv.files import refusal, replaced, write_text
from restkv.prefill import Progress

# What is taken over from the checkpoint: all that a tokenizer and chats need, and what its makers want to go with it.
COMPANIONS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
LEFT = (CONFIG, INDEX, *ADAPTER_FILES)
NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def quantize(
    source: str | Path, out: str | Path, weights: str, dtype: str = "auto", progress: Progress | None = None
) -> int:
    """Write a checkpoint with its matrices in 8 or 4 bits to a new folder.

    The matrices become codes and scales under their own names (modeling.checkpoint.expected.expected_tensors). All else is as it
    was: the tokenizer's files, config.json but for `quantization_config` and a `dtype` that is asked for, which norms and biases
    then have. config.json comes last: a folder without it was not written to its end.

    Args:
        source: a checkpoint folder, or a name on the hub (restkv.load).
        out: a folder that is not there yet, or is empty.
        weights: "int8" or "int4".
        dtype: see restkv.load.
        progress: called with the bytes of weights that are read and those in all.
    Returns:
        the bytes of the weights' file.
    Raises:
        ConfigError, CheckpointError, TooLargeError: the checkpoint cannot be loaded so.
        OutputError: the folder is there already, or cannot be written to.
    """
    require_operators(weights)
    place, folder = Path(out), resolve(source)
    _require_new(place)
    model = load_model(folder, dtype=dtype, weights=weights, progress=progress)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in _companions(folder):
            there = place / file.relative_to(folder)
            there.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, there)
    except OSError as error:
        raise refusal(place, error) from None
    with replaced(place / SINGLE) as stream:
        size = _write_weights(stream, model, weights)
    write_text(place / CONFIG, json.dumps(_config(folder, weights, dtype), indent=2) + "\n")
    return size


def _require_new(place: Path) -> None:
    try:
        taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
    except (OSError, ValueError) as error:
        raise OutputError(f"{place}: cannot be looked at ({error}); choose another place") from None
    if taken:
        raise OutputError(f"{place}: is there already; give a folder that is not, or remove it first")


def _companions(folder: Path) -> Iterator[Path]:
    for pattern in COMPANIONS:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name not in LEFT:
                yield file


def _config(folder: Path, weights: str, dtype: str) -> dict[str, Any]:
    said: dict[str, Any] = {"quantization_config": quantization_config(weights)}
    return read_json(folder / CONFIG) | said | ({} if dtype == "auto" else {"dtype": dtype})


def _write_weights(stream: BinaryIO, model: Decoder, weights: str) -> int:
    """A safetensors file: an 8-byte length, a JSON header of that length, the tensors one after another. Bytes written."""
    slots = weight_slots(model)
    shapes = {name: one.shape for name, one in expected_tensors(_held(model, weights)).items()}
    dtypes = {name: _dtype(slots, name) for name in shapes}
    order = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))  # so every one begins where it may
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for piece in _pieces(slots, name):
            bits: Any = piece.cpu().contiguous().view(-1).view(torch.uint8).numpy()  # sync: a file is written
            stream.write(bits)
    return 8 + len(text) + end


def _held(model: Decoder, weights: str) -> Any:
    return dataclasses.replace(model.config, weights=weights)


def _dtype(slots: dict[str, Tensor | Rows], name: str) -> torch.dtype:
    slot = slots.get(name)
    if isinstance(slot, Tensor):
        return slot.dtype
    if slot is not None:
        return slot.matrix.codes.dtype
    owner = slots[name.removesuffix(SCALES)]
    assert isinstance(owner, Rows)
    return owner.matrix.scales.dtype


def _pieces(slots: dict[str, Tensor | Rows], name: str) -> Iterator[Tensor]:
    """The numbers of a tensor of the file, in their order."""
    slot = slots.get(name)
    if isinstance(slot, Tensor):
        yield slot
        return
    owner = slot or slots[name.removesuffix(SCALES)]
    assert isinstance(owner, Rows)
    for first, last in owner.matrix.pieces():
        first, last = max(first, owner.first), min(last, owner.first + owner.count)
        if first < last:
            yield owner.matrix.stored(first, last)[0 if slot else 1]

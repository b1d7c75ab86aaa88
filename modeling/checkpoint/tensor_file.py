"""Safetensors files, read without being mapped: a file may be larger than the memory and the address space.

A file is an 8-byte length (little endian), a JSON header of that length, which gives every tensor's dtype, shape and
place, and the tensors one after another. The header is checked as strictly as the safetensors library does: tensors lie
inside the file, without gaps or overlaps, and fill it to its last byte; their sizes follow from dtypes and shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modeling.errors import CheckpointError
from modeling.files import LONGEST_START, MB, reason, shortened, stand_in

HEADER_LIMIT = 8 * MB  # bytes; a header takes about a hundred for a tensor
LARGEST = 1 << 63  # no size and no place reaches it
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
CODES = {"I8": torch.int8, "U8": torch.uint8}  # of quantised matrices
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor: name, file, shape, dtype as the header spells it, first byte in the file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class Cut:
    """Some rows (dim 0) of a tensor, or some columns (dim 1) of a matrix."""

    dim: int
    part: slice


class _Damage(Exception):
    """What is wrong with a file, said in a few words."""


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file in the order of their bytes; only its header is read.

    Raises CheckpointError when the file cannot be read, is no complete safetensors file, or stands for one (a Git LFS
    pointer, a web page).
    """
    try:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(max(8, LONGEST_START))
            if what := stand_in(start):
                raise CheckpointError(f"{file}: is {what}")
            length = _header_length(start, size)
            header = bytearray(length)
            stream.seek(8)
            _read_into(stream, memoryview(header))
        return _tensors(file, header, size)
    except (_Damage, OSError) as error:
        raise _incomplete(file, error) from None


def read_pieces(tensor: StoredTensor, chunk_bytes: int, cut: Cut | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The elements of a tensor (of STORED_DTYPES or CODES) in their order, at most `chunk_bytes` at a time.

    Yields their place in the flattened tensor and a 1-D tensor of them, whose memory the next piece overwrites. With a cut they
    are those of the cut alone, and so are their places; nothing else is read. Raises CheckpointError when the file has changed
    since its header was read, or cannot be read.
    """
    dtype = (STORED_DTYPES | CODES)[tensor.dtype]
    runs = _runs(tensor.shape, cut)
    count = runs.count * runs.length
    step = max(1, chunk_bytes // dtype.itemsize)
    if not count:
        return
    buffer = torch.empty(min(step, count), dtype=dtype)
    bytes_of_buffer = buffer.view(torch.uint8).numpy().data  # no sync: files are read into memory of the host
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            for first in range(0, count, step):
                length = min(step, count - first)
                for element, place, run in runs.within(first, length):
                    stream.seek(tensor.start + element * dtype.itemsize)
                    _read_into(stream, bytes_of_buffer[place * dtype.itemsize : (place + run) * dtype.itemsize])
                yield slice(first, first + length), buffer[:length]
    except (_Damage, OSError) as error:
        raise _incomplete(tensor.file, error) from None


@dataclass(frozen=True)
class _Runs:
    """Elements of a stored tensor that lie together: `count` runs of `length`, one every `stride` elements from `first` on."""

    count: int
    length: int
    stride: int
    first: int

    def within(self, begin: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Of `length` elements of the runs from their `begin`-th on: where they lie in the tensor, where among themselves, how
        many lie together.

        >>> list(_Runs(3, 2, 5, 1).within(1, 4))
        [(2, 0, 1), (6, 1, 2), (11, 3, 1)]
        """
        done = 0
        while done < length:
            run, offset = divmod(begin + done, self.length)
            together = min(self.length - offset, length - done)
            yield self.first + run * self.stride + offset, done, together
            done += together


def _runs(shape: tuple[int, ...], cut: Cut | None) -> _Runs:
    if cut is None:
        return _Runs(1, torch.Size(shape).numel(), 0, 0)
    row, size = torch.Size(shape[1:]).numel(), cut.part.stop - cut.part.start
    if cut.dim == 0:
        return _Runs(1, size * row, 0, cut.part.start * row)
    return _Runs(shape[0], size, row, cut.part.start)


def _incomplete(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: no complete safetensors file ({reason(error)}); download it again")


def _read_into(stream: BinaryIO, view: memoryview) -> None:
    while view:
        got = stream.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise _Damage("it ends too early")
        view = view[got:]


def _header_length(start: bytes, size: int) -> int:
    if size < 8 or len(start) < 8:
        raise _Damage(f"it has {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise _Damage(f"its header would have {length:,} bytes, the file has {size:,}")
    if length > HEADER_LIMIT:
        raise _Damage(f"its header has {length:,} bytes, at most {HEADER_LIMIT:,} are read")
    return length


def _tensors(file: Path, header: bytearray, size: int) -> list[StoredTensor]:
    try:
        entries = json.loads(header.decode())
    except (ValueError, RecursionError):
        raise _Damage("its header is no JSON") from None
    if not isinstance(entries, dict):
        raise _Damage("its header is no JSON object")
    entries.pop("__metadata__", None)  # remarks of whoever wrote it
    begin = 8 + len(header)
    places = [(*_place(name, entry), name) for name, entry in entries.items()]
    places.sort()
    expected = 0
    for first, last, name in places:
        if first != expected:
            raise _Damage(f"{shortened(name)} begins at byte {first:,} of the tensors, not at {expected:,}")
        expected = last
    if begin + expected != size:
        raise _Damage(f"its tensors end at byte {begin + expected:,}, the file at {size:,}")
    return [
        StoredTensor(name, file, tuple(entries[name]["shape"]), entries[name]["dtype"], begin + first)
        for first, _, name in places
    ]


def _place(name: str, entry: Any) -> tuple[int, int]:
    """A tensor's first byte and the one after its last, counted from the first tensor, once its entry proves right."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise _Damage(f"{shortened(name)} lacks a dtype, a shape or its data_offsets")
    first, last = offsets
    bits = BITS.get(dtype)  # one that is not known is refused where weights are compared with config.json
    for length in shape:
        if bits is not None:
            bits *= length
            if bits >= 8 * LARGEST:
                raise _Damage(f"{shortened(name)} would have {bits // 8:,} bytes")
    if last < first or (bits is not None and bits != 8 * (last - first)):
        raise _Damage(f"{shortened(name)} has {last - first:,} bytes for {dtype} {shortened(str(shape))}")
    return first, last


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < LARGEST for item in value)

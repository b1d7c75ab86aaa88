"""Tensors and remarks in one safetensors file: written as a whole, with digests of everything, and read through one open file.

The header's `about` holds the remarks as JSON, `digests` the SHA-256 of every tensor's bytes, and `digest` that of both and of
all names, dtypes and shapes. So a header is known to be as it was written before any of it is used, and a tensor before it is
handed out. Digests find damage, not malice: whoever alters a file can write them anew, and what it says must be checked as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from restkv.errors import OutputError, PromptError
from restkv.files import reason, replaced
from restkv.saving.strict_json import parse

FORMAT = "3"  # of the file; other versions are refused: 1 has no digests, 2 does not tell all models apart
MOST_HEADER = 16 << 20  # bytes: the remarks of a conversation of a million tokens
MOST_DIMENSIONS = 8
BLOCK = 1 << 20  # bytes read at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """A tensor in a file: what it is, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_archive(path: str | Path, remarks: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and remarks (JSON) to a file, which replaces an older one at the very end (restkv/files.py).

    Raises:
        OutputError: the file cannot be written, or the remarks are longer than a reader takes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so every one begins where it may
    here = {name: tensors[name].detach().cpu().contiguous() for name in order}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in here.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    digests = json.dumps({name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in here.items()})
    labels = {"restkv": FORMAT, "about": remarks, "digests": digests, "digest": _digest(remarks, digests, header)}
    text = json.dumps({"__metadata__": labels, **header}).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER:
        raise OutputError(
            f"{path}: cannot be written (what was said takes {len(text) / 1e6:.0f} MB, a file holds {MOST_HEADER / 1e6:.0f})"
        )
    with replaced(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in here.values():
            file.write(_bytes(tensor))


class Archive:
    """A file that write_archive wrote, open. Made by `opened`.

    Attributes:
        remarks: what the JSON says.
        places: every tensor by name, not yet read.
    """

    def __init__(self, path: str | Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        header, begin = self._header(size)
        labels = header.pop("__metadata__", None)
        if not isinstance(labels, dict) or "restkv" not in labels:
            raise PromptError(f"{path}: not written by restkv; give a file that a context or a chat was saved to")
        if labels["restkv"] != FORMAT:
            raise PromptError(
                f"{path}: has format {str(labels['restkv'])[:20]!r}, this version of restkv reads {FORMAT}; save it again"
            )
        about, digests = (labels.get(name) for name in ("about", "digests"))
        if not (isinstance(about, str) and isinstance(digests, str)):
            raise self.unreadable("its header is incomplete")
        self.places = self._places(header, begin, size)
        if labels.get("digest") != _digest(about, digests, header):
            raise self.damaged("its header is not as it was written")
        try:
            self.remarks = parse(about)
            self._digests = parse(digests)
        except ValueError as error:
            raise self.unreadable(f"its remarks are no JSON: {error}") from None
        if not isinstance(self._digests, dict):
            raise self.unreadable("its digests are none")

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            PromptError: its bytes are not as they were written, or the file has become shorter.
        """
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        into, digest = memoryview(_bytes(tensor)), hashlib.sha256()
        self._file.seek(place.start)
        for start in range(0, place.size, BLOCK):
            block = into[start : start + BLOCK]
            try:
                count = self._file.readinto(block)  # type: ignore[attr-defined]
            except OSError as error:
                raise self.unreadable(reason(error)) from None
            if count != len(block):
                raise self.unreadable("it became shorter while it was read")
            digest.update(block)
        if self._digests.get(name) != digest.hexdigest():
            raise self.damaged(f"the bytes of {name} are not as they were written")
        if place.dtype == torch.bool and place.size and tensor.view(torch.uint8).max() > 1:
            raise self.unreadable(f"{name} holds what is neither true nor false")
        return tensor

    def unreadable(self, why: str) -> PromptError:
        return PromptError(f"{self._path}: cannot be read as a saved context ({why}); save it again")

    def damaged(self, why: str) -> PromptError:
        return PromptError(f"{self._path}: damaged since it was saved ({why}); save it again")

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        """The header, and where it ends."""
        try:
            first = self._file.read(8)
            length = int.from_bytes(first, "little")
            if first.startswith(b"version "):
                raise self.unreadable("it is a pointer of Git LFS, not the file itself: fetch it with git lfs pull")
            if size < 8 or not 2 <= length <= size - 8:
                raise self.unreadable("it is empty" if size == 0 else "it does not begin with the length of a header")
            if length > MOST_HEADER:
                raise self.unreadable(f"its header takes {length} bytes, at most {MOST_HEADER} are read")
            text = self._file.read(length)
        except OSError as error:
            raise self.unreadable(reason(error)) from None
        try:
            header = parse(text.decode())
        except ValueError:
            raise self.unreadable("its header is no JSON") from None
        if len(text) != length or not isinstance(header, dict):
            raise self.unreadable("its header is no JSON object")
        return header, 8 + length

    def _places(self, header: Mapping[str, Any], begin: int, size: int) -> dict[str, Place]:
        """Where all tensors are: one after the other up to the end of the file."""
        places, at = {}, begin
        starts = {name: _start(entry) for name, entry in header.items()}
        if None in starts.values():
            raise self.unreadable("its header describes no tensors")
        for name in sorted(header, key=lambda name: (starts[name], header[name]["data_offsets"][1])):
            entry = header[name]
            places[name] = place = Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), at)
            if [at - begin, at - begin + place.size] != entry["data_offsets"]:
                raise self.unreadable("the sizes in its header contradict one another")
            at += place.size
        if at != size:
            raise self.unreadable(f"it has {size} bytes, its header tells of {at}")
        return places


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Archive]:
    """Open a file that write_archive wrote; a pipe is not waited for, and a name that is given to another file changes nothing.

    Raises:
        PromptError: no such file, a damaged one, or not one of ours.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; save to it first, or give another") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read as a saved context ({reason(error)})") from None
    except ValueError:  # a zero byte, or half a character
        raise PromptError(f"{str(path)!r}: no file can have this name; give another") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise PromptError(f"{path}: is {what}; give the file that was saved")
    with open(number, "rb") as file:
        yield Archive(path, file)


def _start(entry: Any) -> int | None:
    """Where a tensor of the header begins; None for what describes no tensor that could be here."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return None
    if not (isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES and len(shape) <= MOST_DIMENSIONS):
        return None
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, *offsets)):
        return None
    return offsets[0]


def _digest(about: str, digests: str, header: Mapping[str, Any]) -> str:
    """Of remarks, the digests of the tensors, and the names, dtypes and shapes of them."""
    said = json.dumps([FORMAT, about, digests, header], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU, as a numpy array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()

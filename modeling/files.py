"""The files of a checkpoint as bytes and text: how large they may be, and what often lies there in their place."""

from __future__ import annotations

import os
from pathlib import Path

from modeling.errors import RestKVError

MB = 1 << 20
# Above what any checkpoint of our families has, by a factor of ten or so; what is larger is refused before it is read.
SIZE_LIMITS = {
    "model.safetensors.index.json": 64 * MB,
    "tokenizer.json": 64 * MB,  # twice Gemma 3's, the largest known
    "tokenizer_config.json": 16 * MB,
    "special_tokens_map.json": 16 * MB,
    "added_tokens.json": 16 * MB,
}
SIZE_LIMIT = 4 * MB  # of every other file that is read as text
MAX_VALUES = 2_500_000  # lists, objects and what commas part: a parsed one takes up to a hundred bytes

# How files begin that lie in the place of weights, configurations and tokenizers.
STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder",
    b"version https://hawser": "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder",
    b"# xet version": "a Git Xet pointer, not the file itself; download the file itself",
    b"<!doctype html": "a web page, not the file itself; download the file itself, from /resolve/ and not /blob/",
    b"<html": "a web page, not the file itself; download the file itself, from /resolve/ and not /blob/",
}
LONGEST_START = max(map(len, STAND_INS))


def stand_in(start: bytes) -> str | None:
    """What a file that begins like this is, and the mend, where it only stands for the file that was wanted."""
    lowered = start[:LONGEST_START].lower()
    return next((text for begin, text in STAND_INS.items() if lowered.startswith(begin)), None)


def read_bytes(path: Path, error: type[RestKVError]) -> bytes:
    """The content of a small file.

    Raises `error` with one line when it is too large, cannot be read, or is a Git LFS pointer or a web page.
    """
    limit = size_limit(path)
    try:
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size, error)
            content = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({reason(problem)})") from None
    _check_size(path, len(content), error)  # some files have no size before they are read
    _check_start(path, content, error)
    return content


def size_limit(path: Path) -> int:
    """How many bytes a file of this name may have."""
    return SIZE_LIMITS.get(path.name, SIZE_LIMIT)


def too_many_values(content: bytes) -> bool:
    """Whether parsing JSON could exhaust memory, however short it is: [[],[],... grows twentyfold."""
    return content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES


def reason(error: Exception) -> str:
    """Why it failed, in one line, without the path, which messages name already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shortened(str(error), 300) or type(error).__name__


def shortened(text: str, limit: int = 120) -> str:
    """A stranger's text in one line of at most `limit` characters."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _check_size(path: Path, size: int, error: type[RestKVError]) -> None:
    limit = size_limit(path)
    if size > limit:
        raise error(f"{path}: has {size / MB:,.0f} MB, at most {limit // MB} are read; download the file again")


def _check_start(path: Path, start: bytes, error: type[RestKVError]) -> None:
    if what := stand_in(start):
        raise error(f"{path}: is {what}")

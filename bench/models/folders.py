"""Where the folders of models lie, and whether one is whole: its record, made.json, lists every file with size and digest.

The record is written last, into a folder that has another name until then; so a folder with a record was whole once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.models.listed import Model, ModelError, find

RECORD = "made.json"


@dataclass(frozen=True)
class File:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What a folder was made of (the digest of the GGUF file) and what it then held, by name."""

    gguf: str
    files: Mapping[str, File]


def folder(name: str) -> Path | None:
    """The folder of a model in the user's cache, None where `python -m bench.models NAME` has not made it yet.

    Sizes are looked at and digests are not, which takes no time; the command looks at both.

    Raises:
        ModelError: there is no model of this name, or nobody knows where the user's cache is.
    """
    model = find(name)
    place = in_cache() / name
    return place if is_whole(place, model, digests=False) else None


def in_cache() -> Path:
    """Where the folders of all models lie unless the user says otherwise.

    Raises:
        ModelError: nobody knows where this user is at home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restkv" / "models"
    except RuntimeError:
        raise ModelError("this user has no home folder to keep models in; set XDG_CACHE_HOME or give --into") from None


def is_whole(place: Path, model: Model, digests: bool = True) -> bool:
    """Whether a folder was made of this GGUF file, and holds what it held then."""
    record = read_record(place)
    if record is None or record.gguf != model.sha256:
        return False
    try:
        return all(_is(place / name, file, digests) for name, file in record.files.items())
    except OSError:
        return False


def write_record(place: Path, model: Model) -> None:
    """Record what the folder holds now, all of it on the disk."""
    files = {path.name: File(path.stat().st_size, digest(path, sync=True)) for path in sorted(place.iterdir())}
    text = json.dumps({"model": model.name, **asdict(Record(model.sha256, files))}, indent=2)
    (place / RECORD).write_text(f"{text}\n", "utf-8")
    digest(place / RECORD, sync=True)


def read_record(place: Path) -> Record | None:
    """The record of a folder; None where there is none that can be read."""
    try:
        content = json.loads((place / RECORD).read_text("utf-8"))
        files = {name: File(int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        return Record(str(content["gguf"]), files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def digest(path: Path, sync: bool = False) -> str:
    """The SHA-256 of a file; with `sync`, once all of it is on the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, file: File, digests: bool) -> bool:
    return path.stat().st_size == file.bytes and (not digests or digest(path) == file.sha256)

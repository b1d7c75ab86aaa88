"""JSON-lines files of the user's: read row by row, refused with file, line and field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from modeling.text.characters import fault
from restkv.cli.options import read_text
from restkv.errors import PromptError

LONGEST_ROW = 1 << 28  # bytes; the longest known have some 5 MB


class DataError(PromptError):
    """A file of a benchmark that is missing, or not as the benchmark's files are."""


@dataclass(frozen=True)
class Row:
    """One row; `place` is its file and line."""

    values: Mapping[str, Any]
    place: str

    @classmethod
    def parse(cls, line: str | bytes, place: str) -> Row:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{place}: {_show(values)} is not an object with fields")
        return cls(values, place)

    def get(self, name: str) -> Any:
        if name not in self.values:
            there = ", ".join(map(str, self.values)) or "none at all"
            raise DataError(f"{self.place}: no field {name!r}; the row has {there}")
        return self.values[name]

    def text(self, *names: str) -> str:
        """The text of the first of these fields that the row has."""
        name = next((name for name in names if name in self.values), names[0])
        value = self.get(name)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: field {name!r} is {_show(value)}, not text")
        if wrong := fault(value):
            raise DataError(f"{self.place}: field {name!r} {wrong}; mend or delete the row")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; one text stands for a list of it."""
        value = self.get(name)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{self.place}: field {name!r} is {_show(value)}, neither text nor a list of texts")
        return texts


class Rows:
    """The rows of a file by number, from 0; blank lines do not count. Only their places are held in memory.

    Attributes:
        digest: the first 16 hex digits of the file's SHA-256.
    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        digest = hashlib.sha256()
        self._starts: list[tuple[int, int]] = []  # (line number from 1, offset in bytes)
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), 1):
                    if len(line) > LONGEST_ROW:
                        raise DataError(f"{path}: line {number} has more than {LONGEST_ROW:,} bytes; mend or delete it")
                    digest.update(line)
                    if line.strip():
                        self._starts.append((number, offset))
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give the benchmark's own files") from None
        if not self._starts:
            raise DataError(f"{path}: has no rows; give the benchmark's own files")
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        number, offset = self._starts[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            return Row.parse(file.readline(), f"{self.path}: line {number}")

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def text_rows(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) of a file that is read whole, by the rule for all texts (restkv.cli.options.read_text)."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, Row.parse(line, f"{path}, line {number}")) for number, line in lines if line.strip()]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Texts to read, from files, and the windows that are cut from them.

NAME.txt      a document
NAME.jsonl    rows with "page": a document each (WikiText by pages); rows with "text": pieces of one document, joined with
              nothing between them (WikiText by lines, PG19 by books), as StreamingLLM and LaCache read them
a folder      all of these in it, in the order of their names
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.quality.prose import require_room, sentences
from bench.runs.jsonl import text_rows
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import read_text, reading
from restkv.errors import PromptError, RestKVWarning

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text and what to call it."""

    name: str
    text: str


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document, after what the tokenizer puts before every prompt.

    Attributes:
        start: the first of them, counted in the document's tokens.
        ids: all token ids; the first `first` of them are read and not scored.
        words, bytes: of the scored text: pieces between white space, and UTF-8.
    """

    document: str
    start: int
    ids: list[int]
    first: int
    words: int
    bytes: int

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.first]

    @property
    def scored(self) -> list[int]:
        return self.ids[self.first :]


def read_documents(path: Path) -> list[Document]:
    """The documents of a file or a folder; those without any text are left out."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise PromptError(
                f"{path}: no {' and no '.join(SUFFIXES)} file in this folder; convert your texts to these"
            )
        documents = [document for file in files for document in _read(file)]
    else:
        documents = _read(path)
    if not documents:
        raise PromptError(f"{path}: no text in it; give another")
    return documents


def _read(path: Path) -> list[Document]:
    with reading(path):
        path.stat()
    if path.suffix not in SUFFIXES:
        raise PromptError(f"{path}: not {' or '.join(SUFFIXES)}; convert it first")
    if path.suffix == ".txt":
        content = read_text(path)
        return [Document(path.name, content)] if content.strip() else []
    pages, pieces = [], []
    for number, row in text_rows(path):
        if "page" in row.values:
            pages.append(Document(f"{path.name}:{number}", row.text("page")))
        else:
            pieces.append(row.text("text"))
    documents = [page for page in pages if page.text.strip()]
    joined = "".join(pieces)
    if documents and joined:
        raise PromptError(f"{path}: some rows have a page and some a text; put them into two files")
    return [Document(path.name, joined)] if joined.strip() else documents


def prose(tokenizer: Tokenizer, tokens: int, seed: int) -> Document:
    """Prose of bench/quality/prose.py, of at least so many tokens."""
    require_room(tokens)
    told, count, source = [], 0, sentences(random.Random(f"prose/{seed}"))
    while count < tokens:
        some = " ".join(next(source) for _ in range(100))
        told.append(some)
        count += len(tokenizer.encode(some, bos=False)) - 1  # a space that joins two pieces may cost or save a token
    return Document("generated prose", " ".join(told))


def cut_windows(
    tokenizer: Tokenizer, documents: Sequence[Document], context: int, scored: int, count: int
) -> list[Window]:
    """Up to `count` windows that share no token, evenly chosen from all that the documents have room for. Where they have room
    for fewer, a RestKVWarning says so.

    Args:
        context: tokens before the scored ones, those that the tokenizer puts before a prompt among them; 0: as few as
            possible, which is these alone, or the first token of the text where there are none.
        scored: tokens scored; one less where the text's own first token has to go unscored.
    """
    before = tokenizer.encode("")
    size = max(context - len(before), 0) + scored
    windows, longest = [], 0
    for document in documents:
        ids, ends = tokenizer.encode(document.text, bos=False), tokenizer.ends(document.text)
        longest = max(longest, len(ids))
        for start in range(0, len(ids) - size + 1, size):
            whole = before + ids[start : start + size]
            first = max(context, len(before), 1)
            after = start + first - len(before)  # the first scored token, in the document
            said = document.text[ends[after - 1] if after else 0 : ends[start + size - 1]]
            windows.append(Window(document.name, start, whole, first, len(said.split()), len(said.encode())))
    if not windows:
        raise PromptError(f"no text has the {size} tokens of a window (the longest has {longest}); read fewer tokens")
    if len(windows) < count:
        warnings.warn(
            f"the texts have room for {len(windows)} windows of {size} tokens, not for {count}; all of them are read",
            RestKVWarning,
            stacklevel=3,
        )
        return windows
    return [windows[index * len(windows) // count] for index in range(count)]

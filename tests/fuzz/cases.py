"""Cases of the fuzzer, and the valid things that they start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from make.families import save_case
from make.toy_tokenizers import KINDS, TOKENS


@dataclass(frozen=True)
class Case:
    """A command line and what stands in its folder.

    Attributes:
        files: name -> content. links: name -> a valid file that is as it was.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)
    stdin: bytes = b""


@dataclass(frozen=True)
class Target:
    """A kind of thing.

    Attributes:
        prepare: makes the valid ones in a folder, once; returns what the other two are given.
        cases: a strategy over changed ones.
        unchanged: cases with nothing changed, which must be answered.
        weight: how many cases, against the other targets.
    """

    name: str
    prepare: Callable[[Path], Any]
    cases: Callable[[Any], st.SearchStrategy[Case]]
    unchanged: Callable[[Any], list[Case]]
    weight: float = 1.0


FAMILIES = ["llama31", "mistral_v01", "gemma2", "gemma3", "qwen2_window", "qwen25_yarn", "qwen3"]


ASK = ("-p", "a b", "-n", "2", "--budget", "8", "--set", "window=2", "--no-chat")


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    if not folder.exists():
        folder.mkdir(parents=True)
        make(folder)
    return folder


def write_tokenizer(folder: Path, kind: str = "byte_level") -> None:
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))


def make_checkpoint(folder: Path, name: str, tokenizer: str = "byte_level", **config: Any) -> Path:
    """A tiny random checkpoint with a tokenizer whose ids it has."""

    def make(place: Path) -> None:
        from make import families

        before, families.VOCAB = families.VOCAB, 420
        try:
            save_case(name, place)
        finally:
            families.VOCAB = before
        write_tokenizer(place, tokenizer)
        (place / "generation_config.json").unlink(missing_ok=True)

    return once(folder, make)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def families_of(ground: Path) -> list[Path]:
    return [make_checkpoint(ground / "checkpoints" / name, name) for name in FAMILIES]


def linked(folder: Path, *but: str, into: str = "m") -> dict[str, Path]:
    return {f"{into}/{path.name}": path for path in folder.iterdir() if path.name not in but}

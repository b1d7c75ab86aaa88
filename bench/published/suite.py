"""What all published benchmarks are made of: tasks, items, and the sources that items come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.published.metrics import Metric
from bench.published.templates import Template, find_templates
from bench.runs.jsonl import DataError, Row, Rows
from restkv.errors import PromptError
from restkv.lm import LM

# As the benchmark's own repository runs and scores it; as the ReST-KV paper's code does (docs/published-benchmarks.md).
OFFICIAL, PAPER = "official", "restkv-paper"
# Tokens of prompt by the model's positions: what a repository gives its models of that context. Others get 96 % of theirs,
# about what these are.
LONGEST = {
    OFFICIAL: {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500, 131072: 120000},
    PAPER: {4096: 3950, 8192: 7950, 32768: 31500, 131072: 127000},
}


@dataclass(frozen=True)
class Task:
    """How a task is asked and scored.

    Attributes:
        chat: asked through the chat template, where the model has one.
        least_one: the first token may not end the answer.
        newline_ends: a line break ends it, and of the end-of-sequence tokens the tokenizer's: the scripts that stop at line
            breaks name these two.
    """

    name: str
    metric: Metric
    max_new_tokens: int
    chat: bool = False
    least_one: bool = False
    newline_ends: bool = False


@dataclass(frozen=True)
class Item:
    """A prompt as text, before it is cut and tokenised, and what its answer is scored by; `place` is where it comes from."""

    prompt: str
    answers: list[Any]
    place: str
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """Items of one task, at one length and depth where the benchmark has such; made when they are needed.

    Attributes:
        wording: where the prompt's wording comes from.
    """

    task: Task
    count: int
    item: Callable[[int], Item]
    wording: str
    length: int | None = None
    depth: float | None = None

    @classmethod
    def of(cls, task: Task, rows: Rows, item: Callable[[Row], Item], wording: str, length: int | None = None) -> Source:
        """An item of each row; all are made once, so that a row that is not as it should be is refused before anything is run."""
        for row in rows:
            item(row)
        return cls(task, len(rows), lambda index: item(rows[index]), wording, length)


@dataclass(frozen=True)
class Suite:
    """A benchmark, ready to be run on a model.

    Attributes:
        kind: of the run, such as "longbench".
        max_length: prompts of more tokens lose their middle; None: never.
        joined: what is left of them is one text; otherwise each half is decoded by itself, and where a tokenizer drops the
            space at the beginning of a text, the halves meet without one.
        eos: ids that end an answer.
        facts: JSON-ready, what results depend on besides: digests of files, and of the templates.
    """

    kind: str
    protocol: str
    sources: tuple[Source, ...]
    max_length: int | None
    eos: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    joined: bool = False


def check_protocol(protocol: str) -> None:
    if protocol not in LONGEST:
        raise PromptError(f"protocol {protocol!r} is not known; choose from {', '.join(LONGEST)}")


def longest_prompt(lm: LM, protocol: str) -> int:
    """Tokens of prompt that the protocol grants a model of this many positions."""
    positions = lm.config.max_positions
    return LONGEST[protocol].get(positions, positions * 96 // 100)


def end_ids(lm: LM, protocol: str) -> tuple[int, ...]:
    """The checkpoint's end-of-sequence ids; under the paper's protocol the tokenizer's alone, where it has one."""
    return lm.tokenizer.eos_ids if protocol == PAPER and lm.tokenizer.eos_ids else lm.config.eos_token_ids


def choose(names: Sequence[str] | None, files: Mapping[str, Path], where: Path) -> dict[str, Rows]:
    """The rows of the tasks that were asked for, or (None) of those that there are files for."""
    for name in names or ():
        if name not in files:
            raise DataError(f"task {name!r} is not known; choose from {', '.join(files)}")
    chosen = names or [name for name, path in files.items() if path.exists()]
    if not chosen:
        raise DataError(
            f"{where}: no file of any task, such as {next(iter(files))}.jsonl; name the benchmark's folder with --data"
        )
    return {name: Rows(files[name]) for name in chosen}


def by_task(
    kind: str,
    lm: LM,
    folder: Path,
    names: Sequence[str] | None,
    protocol: str,
    templates: Path | None,
    hashes: Mapping[str, str],
    own: Mapping[str, str],
    task: Callable[[str, str], Task],
    item: Callable[[str, Template, Row], Item],
) -> Suite:
    """A benchmark on a folder of DIR/{task}.jsonl.

    Args:
        names: tasks; None takes all that there are files of.
        templates, hashes, own: see find_templates.
        task: from name and protocol. item: from a task's name, its template and a row.
    """
    check_protocol(protocol)
    files = choose(names, {name: folder / f"{name}.jsonl" for name in hashes}, folder)
    texts, digest = find_templates(kind, templates, {name: hashes[name] for name in files}, own)
    sources = tuple(
        Source.of(task(name, protocol), rows, partial(item, name, texts[name]), texts[name].source)
        for name, rows in files.items()
    )
    facts = {"files": {name: rows.digest for name, rows in files.items()}, "templates": digest}
    return Suite(kind, protocol, sources, longest_prompt(lm, protocol), end_ids(lm, protocol), facts)

"""What all published benchmarks are made of: tasks, items, and the sources that items come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.published.data import DataError
from bench.published.metrics import Metric
from restkv.errors import PromptError
from restkv.lm import LM

OFFICIAL, PAPER = "official", "restkv-paper"
PROTOCOLS = {
    OFFICIAL: "as the benchmark's own repository runs and scores it",
    PAPER: "as the ReST-KV paper's code runs it: no chat template, and the other differences of docs/published-benchmarks.md",
}
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
    if protocol not in PROTOCOLS:
        raise PromptError(f"protocol {protocol!r} is not known; choose from {', '.join(PROTOCOLS)}")


def longest_prompt(lm: LM, protocol: str) -> int:
    """Tokens of prompt that the protocol grants a model of this many positions."""
    positions = lm.config.max_positions
    return LONGEST[protocol].get(positions, positions * 96 // 100)


def end_ids(lm: LM, protocol: str) -> tuple[int, ...]:
    """The checkpoint's end-of-sequence ids; under the paper's protocol the tokenizer's alone, where it has one."""
    return lm.tokenizer.eos_ids if protocol == PAPER and lm.tokenizer.eos_ids else lm.config.eos_token_ids


def choose(
    names: Sequence[str] | None, known: Sequence[str], path: Callable[[str], Path | None], where: Path
) -> list[str]:
    """The tasks that were asked for, or (None) those that there are files for.

    Raises:
        DataError: an unknown task, or none with a file.
    """
    for name in names or ():
        if name not in known:
            raise DataError(f"task {name!r} is not known; choose from {', '.join(known)}")
    chosen = list(names) if names else [name for name in known if path(name)]
    if not chosen:
        raise DataError(
            f"{where}: no file of any task, such as {known[0]}.jsonl; name the benchmark's folder with --data"
        )
    return chosen

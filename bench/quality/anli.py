"""ANLI (Nie et al. 2020) under compression: does a premise follow from a cache that has lost most of it? (docs/sources.md §4.5)

The data are read where the user has them, as they are published (CC BY-NC 4.0, not part of restkv):

    anli_v1.0/R1/train.jsonl, dev.jsonl, test.jsonl; R2 and R3 likewise
    {"uid": ..., "premise" or "context": ..., "hypothesis": ..., "label": "e", "n" or "c", ...}

The prompt is lm-eval's; its answers True, Neither and False are compared by bench/quality/choice.py. Worked examples (`shots`)
come from the round's training file and stand before the premise, so that there is something to evict.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.quality.choice import CHOICE, Item, choice_batches, shortest
from bench.report.likelihood import anli_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import chosen_rows, digest
from bench.runs.jsonl import Row, text_rows
from bench.runs.methods import Method, check
from bench.runs.plans import Asked, by_turns, cells_of, modes_of, share
from bench.runs.run import Work
from restkv.errors import PromptError
from restkv.lm import LM

ROUNDS, SPLITS = (1, 2, 3), ("train", "dev", "test")
LABELS = {"e": " True", "n": " Neither", "c": " False"}  # entailment, neutral, contradiction
PREMISES = ("premise", "context")  # what the field is called, in the README and in the files
LEAST = 8  # entries per KV head, however small a share of a short premise is asked for


@dataclass(frozen=True)
class Example:
    """A row of the data."""

    uid: str
    premise: str
    hypothesis: str
    label: str

    @property
    def question(self) -> str:
        """What follows the premise, up to the answer."""
        return f"\nQuestion: {self.hypothesis} True, False, or Neither?\nAnswer:"


@dataclass(frozen=True)
class AnliPlan:
    """The arguments of a run.

    Attributes:
        data: the folder that holds R1, R2 and R3, or their parent.
        budgets: shares of the prompt, or entries per KV head.
        shots: worked examples before each premise, drawn for each sample anew.
        limit: samples per round at most, after `fraction` has chosen; None: all of them.
        fraction: of each round's samples, spread evenly over the file.
        question: aware, agnostic or both.
    """

    data: Path
    methods: tuple[Method, ...]
    budgets: tuple[Asked, ...]
    rounds: tuple[int, ...] = ROUNDS
    split: str = "test"
    shots: int = 0
    limit: int | None = None
    question: str = "both"
    seed: int = 0
    fraction: float = 1.0
    kind: ClassVar[str] = "anli"

    def work(self, lm: LM) -> Work:
        """See bench.runs.run.Plan; the data are in the arguments as a hash."""
        modes = modes_of(self.question)
        items = anli_items(self.data, self.rounds, self.split, self.shots, self.limit, self.seed, self.fraction)
        cells = cells_of(self.methods, self.budgets)
        length = shortest(lm, items, modes)
        for cell in cells:
            what = f"budget {cell.asked:g} of the shortest prompt, {length} tokens"
            check(lm, cell.method, _entries(cell.asked, length), length, what)
        arguments = {
            "data": digest(repr(items)),
            "budgets": list(self.budgets),
            "tasks": [f"R{number}" for number in self.rounds],
            **{name: getattr(self, name) for name in ("split", "shots", "limit", "fraction", "question", "seed")},
        }
        most = max(_entries(asked, length) for asked in self.budgets)
        return Work(arguments, self.methods, most, choice_batches(lm, items, modes, cells, _entries))


def _entries(asked: Asked, length: int) -> int:
    return max(LEAST, share(asked, length))


# -- data


def anli_items(
    data: Path,
    rounds: Sequence[int] = ROUNDS,
    split: str = "test",
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
    fraction: float = 1.0,
) -> list[Item]:
    """The samples of some rounds, by turns, each with worked examples of its own before it. See AnliPlan."""
    if not rounds or not set(rounds) <= set(ROUNDS):
        raise PromptError(f"rounds {', '.join(map(str, rounds))}: ANLI has {', '.join(map(str, ROUNDS))}")
    if split not in SPLITS:
        raise PromptError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    if shots < 0:
        raise PromptError(f"shots {shots}: give at least 0")
    root = next((root for root in (data, data / "anli_v1.0") if (root / f"R{rounds[0]}").is_dir()), None)
    if root is None:
        raise PromptError(f"{data}: has no folder R{rounds[0]}; name the folder anli_v1.0 of the published archive")
    columns = []
    for number in rounds:
        examples = read_examples(root / f"R{number}" / f"{split}.jsonl")
        pool = read_examples(root / f"R{number}" / "train.jsonl") if shots else []
        chosen = chosen_rows(len(examples), fraction, limit)
        columns.append([_item(number, index, examples[index], pool, shots, seed) for index in chosen])
    return by_turns(columns)


def _item(number: int, index: int, example: Example, pool: Sequence[Example], shots: int, seed: int) -> Item:
    others = [other for other in pool if other.uid != example.uid]
    if len(others) < shots:
        raise PromptError(
            f"R{number}: {shots} shots asked for, {len(others)} training rows to draw from; ask for fewer"
        )
    drawn = random.Random(f"R{number}/{seed}/{index}").sample(others, shots)
    worked = "".join(f"{shot.premise}{shot.question}{LABELS[shot.label]}\n\n" for shot in drawn)
    label = list(LABELS).index(example.label)
    context = worked + example.premise
    return Item(f"R{number}", index, example.uid, context, example.question, tuple(LABELS.values()), label)


def read_examples(path: Path) -> list[Example]:
    """The rows of a file, in its order; empty lines are passed over."""
    examples = [_example(row, number) for number, row in text_rows(path)]
    if not examples:
        raise PromptError(f"{path}: has no rows; give the file of the published archive")
    return examples


def _example(row: Row, number: int) -> Example:
    example = Example(
        str(row.values.get("uid", number)), row.text(*PREMISES), row.text("hypothesis"), row.text("label")
    )
    if not example.premise.strip() or not example.hypothesis.strip():
        raise PromptError(f"{row.place}: no text in premise or hypothesis; mend or delete the row")
    if example.label not in LABELS:
        raise PromptError(
            f"{row.place}: label {example.label!r} is none of {', '.join(LABELS)}; mend or delete the row"
        )
    return example


ARGUMENTS = {"tasks": must.many(must.name, 1)}
register(Benchmark("anli", "ANLI on evicted premises", anli_parts, CHOICE, ARGUMENTS))

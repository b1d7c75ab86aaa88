"""Classification by teacher forcing: of a few answers to a question over a context, which is the likeliest?

As in lm-eval's multiple choice, an answer counts with the sum of its tokens' log-probabilities, whatever its length; nothing
is generated. A row has whether the right one is the likeliest, and its share of the likelihood of all that are offered.

"agnostic": the context is evicted, and the question appended to what is left. "aware": context and question are evicted
together, all but the prompt's last token, which is read on what is left: the first token of an answer would otherwise be
judged by a forward pass that has seen everything, and answers of one token would not depend on the method at all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench.quality.prose import require_room
from bench.quality.tasks import Frame, make_sample, parted
from bench.quality.teacher_forcing import score_choices
from bench.runs import schema as must
from bench.runs.folder import digest
from bench.runs.plans import Cell, Entries, policy_of
from bench.runs.rows import Row
from bench.runs.run import Batch
from modeling.text.tokenizer import Tokenizer
from restkv.errors import PromptError
from restkv.lm import LM

# A thing's code against the codes of two other things; the box around a number against two other boxes of the same text.
TOLD_TASKS = {"codes": "niah_multikey", "boxes": "vt"}
WRONG = 2  # wrong answers to choose from, as many as in ANLI


@dataclass(frozen=True)
class Item:
    """A question with its answers.

    Attributes:
        task, index: which one it is; results are grouped by task.
        name: what the data call it.
        context, question: the prompt is their concatenation.
        choices: what may follow it, each with its own first space; label: the number of the right one.
    """

    task: str
    index: int
    name: str
    context: str
    question: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Encoded:
    """An item's token ids: of the context, of the question, and of each choice after both."""

    context: list[int]
    question: list[int]
    choices: list[list[int]]

    def split(self, mode: str) -> tuple[list[int], list[int]]:
        """(what is prefilled and evicted, what is appended afterwards), neither of them empty."""
        whole = self.context + self.question
        at = len(whole) - 1 if mode == "aware" else len(self.context)
        return whole[:at], whole[at:]


def encode(tokenizer: Tokenizer, item: Item) -> Encoded:
    """Context and question joined are exactly the encoding of the whole prompt; choices are those of text that goes on."""
    whole = tokenizer.encode(item.context + item.question)
    context, question = parted(whole, tokenizer.encode(item.context))
    if not context or not question:
        raise PromptError(f"{item.task} {item.name}: context or question has no token of its own; leave this item out")
    return Encoded(context, question, [tokenizer.encode_more(choice) for choice in item.choices])


def told_items(tokenizer: Tokenizer, length: int, samples: int, seed: int) -> list[Item]:
    """Items made by restkv for a model that knows no instructions: the right value against two others told in the context.

    They are samples of bench/quality/tasks.py (TOLD_TASKS), `length` tokens long, `samples` of each task, by turns. Guessing is
    right once in three times, and so is a model that has seen which values there are but not which of them is asked for.
    """
    require_room(samples * len(TOLD_TASKS) * length, length)
    frame, items = Frame(tokenizer), []
    for index in range(samples):
        for task, source in TOLD_TASKS.items():
            sample = make_sample(source, length, seed, index, frame)
            rng = random.Random(f"{task}/{length}/{seed}/{index}")
            right = sample.answers[0]
            told = [needle.rstrip(".").rsplit(" ", 1)[1] for needle, _ in sample.meta["needles"]]
            choices = [right, *rng.sample([value for value in told if value != right], WRONG)]
            rng.shuffle(choices)
            question = f" {sample.question} {sample.answer_prefix}"
            spaced = tuple(f" {choice}" for choice in choices)
            items.append(Item(task, index, str(index), sample.context, question, spaced, choices.index(right)))
    return items


def shortest(lm: LM, items: Sequence[Item], modes: Sequence[str]) -> int:
    """Tokens of the shortest prompt that will be evicted; every item can be encoded."""
    lengths = []
    for item in items:
        ids = encode(lm.tokenizer, item)
        for part in (ids.context, ids.question, *ids.choices):
            lm.encode(part)
        lengths += [len(ids.split(mode)[0]) for mode in modes]
    return min(lengths)


def choice_batches(
    lm: LM, items: Sequence[Item], modes: Sequence[str], cells: Sequence[Cell], entries: Entries, once: bool = False
) -> list[Batch]:
    """Of a row per item, mode and cell, item by item.

    Args:
        once: no method evicts after the prompt.
    """
    return [
        Batch(
            [f"choice/{mode}/{item.task}/{item.index}/{cell.key}" for cell in cells],
            partial(_rows, lm, item, mode, cells, entries, once),
        )
        for item in items
        for mode in modes
    ]


def _rows(lm: LM, item: Item, mode: str, cells: Sequence[Cell], entries: Entries, once: bool) -> list[Row]:
    ids = encode(lm.tokenizer, item)
    prompt, question = ids.split(mode)
    policies = [policy_of(lm, cell, entries(cell.asked, len(prompt)), prompt, once) for cell in cells]
    about = {"part": "choice", "question": mode, "task": item.task, "index": item.index, "name": item.name}
    read = {"tokens": len(prompt), "prompt": digest(repr(ids))}
    told = score_choices(lm, policies, prompt, question, ids.choices)
    rows = []
    for cell, policy, (held, sums) in zip(cells, policies, told, strict=True):
        logprobs = [round(value, 6) for value in sums]
        choice = logprobs.index(max(logprobs))
        likelihood = round(share_of_right(logprobs, item.label), 6)
        said = {"choice": choice, "label": item.label, "score": float(choice == item.label), "likelihood": likelihood}
        count = entries(cell.asked, len(prompt))
        rows.append(cell.row(count, policy, held, about, {"logprobs": logprobs, **read, **said}))
    return rows


def share_of_right(logprobs: Sequence[float], label: int) -> float:
    """How likely the right answer is among the answers offered: it says more of a question than whether it is the likeliest."""
    most = max(logprobs)
    shares = [math.exp(value - most) for value in logprobs]
    return shares[label] / sum(shares)


CHOICE: must.Fields = {  # what a row of these must hold
    **must.SCORED,
    "question": must.MODE,
    "likelihood": must.Absent(must.SCORE),
}

"""Run a published benchmark: every method at every budget answers every item, one prefill for all of them.

Letters: L prompt length.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from bench.published.suite import Item, Source, Suite
from bench.published.tables import TITLES, published_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import chosen_rows, digest
from bench.runs.jsonl import DataError
from bench.runs.methods import Method, check
from bench.runs.plans import Asked, Cell, by_turns, cells_of, share
from bench.runs.rows import Row
from bench.runs.run import Batch, Work
from bench.runs.together import answer_all
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.policies import Policy
from restkv.results import Decoding


@dataclass(frozen=True)
class Plan:
    """What is run of a suite.

    Attributes:
        checkpoint: the model's name, by which published figures are found.
        budgets: entries per KV head (of methods with a set per query head: per query head), window and sinks included, as the
            papers count them; or fractions of the prompt.
        limit: items per source at most.
        fraction: of each source's items, spread evenly over it.
        max_length: tokens of prompt, in place of the protocol's.
    """

    suite: Suite
    checkpoint: str
    methods: tuple[Method, ...]
    budgets: tuple[Asked, ...]
    limit: int | None = None
    fraction: float = 1.0
    max_length: int | None = None

    @property
    def longest(self) -> int | None:
        return self.max_length or self.suite.max_length

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.methods, self.budgets)

    @property
    def kind(self) -> str:
        return self.suite.kind

    def chosen(self, source: Source) -> list[int]:
        """Numbers of the items that are run."""
        return chosen_rows(source.count, self.fraction, self.limit)

    def work(self, lm: LM) -> Work:
        """Item by item over all sources. See bench.runs.run.Plan; only whole budgets are known to work before an item is read."""
        _check(lm, self)
        sources = self.suite.sources
        arguments = {
            "protocol": self.suite.protocol,
            "checkpoint": self.checkpoint,
            "tasks": list(dict.fromkeys(source.task.name for source in sources)),
            "lengths": list(dict.fromkeys(source.length for source in sources if source.length)),
            "budgets": list(self.budgets),
            "limit": self.limit,
            "fraction": self.fraction,
            "max_length": self.longest,
            "eos": list(self.suite.eos),
            "decoding": "greedy",
            **self.suite.facts,
        }
        batches = [
            Batch([_key(source, index, cell) for cell in self.cells], partial(answer, lm, self, source, index))
            for source, index in by_turns([(source, index) for index in self.chosen(source)] for source in sources)
        ]
        largest = max(share(cell.asked, self.longest or lm.config.max_positions) for cell in self.cells)
        return Work(arguments, self.methods, largest, batches)


def _key(source: Source, index: int, cell: Cell) -> str:
    asked = None if cell.method.full else cell.asked
    places = [source.task.name, source.length, source.depth, index, cell.method.label, asked]
    return "/".join(f"{place}" for place in places if place is not None)


def answer(lm: LM, plan: Plan, source: Source, index: int) -> list[Row]:
    """An item's answers in all cells."""
    task, item = source.task, source.item(index)
    ids, cut, chat = encode(lm, item, task.chat, plan.longest, plan.suite.joined)
    eos = list(plan.suite.eos)
    if task.newline_ends:
        eos = [*(lm.tokenizer.eos_ids or eos), lm.tokenizer.encode("\n", bos=False)[-1]]
    policies: list[Policy] = []
    for cell in plan.cells:
        entries = share(cell.asked, len(ids))
        check(lm, cell.method, entries, len(ids), f"{len(ids)} tokens of {item.place}")
        policies.append(cell.method.policy(entries))
    about = {
        "protocol": plan.suite.protocol,
        "task": task.name,
        "length": source.length,
        "depth": source.depth,
        "index": index,
        "wording": source.wording,
    }
    read = {"tokens": len(ids), "cut": cut, "chat": chat, "prompt": digest(repr(ids)), "answers": item.answers}
    rows = []
    answers = answer_all(lm, policies, ids, Decoding(task.max_new_tokens), eos=eos, least_one=task.least_one)
    for cell, policy, (held, said) in zip(plan.cells, policies, answers, strict=True):
        found = {
            "output": said.text,
            "new_tokens": len(said.tokens),
            "ended": said.finish_reason,
            "score": round(task.metric(said.text, item.answers, item.classes), 6),
        }
        rows.append(cell.row(share(cell.asked, len(ids)), policy, held, about, {**read, **found}))
    return rows


def encode(lm: LM, item: Item, chat: bool, longest: int | None, joined: bool = False) -> tuple[list[int], int, bool]:
    """Token ids of an item's prompt, how many tokens were cut out of its middle, and whether a chat template is around it.

    A longer prompt becomes the text of its first and of its last longest / 2 tokens, special ones left out, tokenised again
    (joined: see Suite); the chat template comes after that and writes any BOS itself.
    """
    words = lm.tokenizer
    text, ids = item.prompt, words.encode(item.prompt)
    cut = 0
    if longest is not None and len(ids) > longest:
        half = longest // 2
        pieces = [ids[:half] + ids[-half:]] if joined else [ids[:half], ids[-half:]]
        text = "".join(map(words.decode, pieces))
        cut = len(ids) - 2 * half
        ids = words.encode(text)
    chat = chat and words.has_chat_template
    if chat:
        ids = words.chat([{"role": "user", "content": text}])
    if not item.prompt or not ids:
        raise DataError(f"{item.place}: the prompt is empty")
    return lm.encode(ids), cut, chat


def _check(lm: LM, plan: Plan) -> None:
    if plan.max_length is not None and plan.max_length < 2:
        raise PromptError(f"max_length {plan.max_length}: a prompt has two halves; give at least 2")
    positions = lm.config.max_positions
    longest = plan.longest or max((source.length or 0 for source in plan.suite.sources), default=0)
    for cell in plan.cells:
        check(lm, cell.method, share(cell.asked, longest or positions), longest or positions, f"budget {cell.asked}")
    room = max(source.task.max_new_tokens for source in plan.suite.sources)
    if longest + room > positions:
        warnings.warn(
            f"prompts of up to {longest} tokens with {room} new ones exceed the model's {positions} positions; "
            "the text may degrade; --max-length shortens prompts",
            RestKVWarning,
            stacklevel=3,
        )


ARGUMENTS: must.Fields = {
    "tasks": must.many(must.name, 1),
    "budgets": must.many(must.ASKED),
    "protocol": must.name,
    "checkpoint": must.name,
    "model": must.name,
    "max_length": must.maybe(must.whole()),
}
ANSWERED: must.Fields = {
    **must.SCORED,
    "length": must.maybe(must.whole()),
    "depth": must.maybe(must.number(0, 1)),
    "wording": must.name,
    "chat": must.boolean,
    "tokens": must.whole(),
    "cut": must.whole(),
}
PLACED: Mapping[str, must.Fields] = {
    "ruler-official": {"length": must.whole(1)},
    "needle-official": {"length": must.whole(1), "depth": must.number(0, 1)},
}
register(
    *(
        Benchmark(kind, title, partial(published_parts, kind), {**ANSWERED, **PLACED.get(kind, {})}, ARGUMENTS)
        for kind, title in TITLES.items()
    )
)

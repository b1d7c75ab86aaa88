"""Accuracy of every method on RULER's families (bench/quality/tasks.py) at equal bytes, with and without the question in sight.

"aware": context and question are one prompt, and what is evicted is chosen with the question in sight. "agnostic": the
context is compressed first and asked afterwards (restkv.LM.compress). Rankings differ between the two, so every row says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import product
from typing import Any

from bench.quality.tasks import Frame, Sample, make_sample, score
from bench.report.retrieval import ruler_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import digest
from bench.runs.methods import Method, check, equal_bytes
from bench.runs.plans import Cell, at_least, cells_of, check_compression, compressed, modes_of
from bench.runs.rows import Row
from bench.runs.run import Batch, Work
from bench.runs.together import Held, answer_all, pattern_of
from modeling.room import enough_memory, require
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.patterns import Pattern
from restkv.policies import Policy
from restkv.results import Decoding

PER_KEY, PER_BATCH = 150, 500  # bytes, about, of what is planned
FULL_STOP = "."  # ends every answer


@dataclass(frozen=True)
class Plan:
    """What is asked of whom: the arguments of a run, all of which results depend on.

    Attributes:
        depths: where the needle shall be; (None,) leaves it to the task.
        samples: per task, length and depth.
        compression: prompt length over entries per KV head.
        question: aware, agnostic or both.
        prefill: "dense", or the sparse pattern with which all prompts are read, as text (restkv/patterns.py).
        kind: "ruler", or "needle" for the plan of bench/quality/needle.py.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    compression: tuple[float, ...]
    samples: int
    question: str = "both"
    seed: int = 0
    chat: bool = False
    depths: tuple[float | None, ...] = (None,)
    prefill: str = "dense"
    kind: str = "ruler"

    def arguments(self) -> dict[str, Any]:
        """JSON-ready."""
        once = any(method.once for method in self.methods)
        said = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("kind", "methods")}
        return {**said, "evict": "prompt" if once else "always"}

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.methods, self.compression)

    def work(self, lm: LM) -> Work:
        """Sample by sample, number by number, so that a broken run has some of everything. See bench.runs.run.Plan."""
        _check(lm, self)
        frame, pattern = Frame(lm.tokenizer, self.chat), pattern_of(self.prefill)

        @cache
        def policy(cell: Cell, mode: str, task: str, length: int) -> Policy:
            """A budget that has to be searched for is found on a sample that the run does not use (number -1), so that an
            interrupted run finds the same."""

            def prompt() -> list[int]:
                sample = make_sample(task, length, self.seed, -1, frame)
                context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
                return context + asked if mode == "aware" else context

            return equal_bytes(lm, cell.method, compressed(cell.asked, length), prompt, pattern)

        def rows(length: int, task: str, depth: float | None, mode: str, index: int) -> list[Row]:
            """A sample's answers in all cells, which share its prefill."""
            sample = make_sample(task, length, self.seed, index, frame, depth)
            policies = [policy(cell, mode, task, length) for cell in self.cells]
            answers = answer(lm, frame, sample, mode, policies, pattern)
            about = {"question": mode, "task": task, "length": length, "depth": sample.depth, "index": index}
            return [
                cell.row(compressed(cell.asked, length), made, held, {**about, "seed": self.seed}, said)
                for cell, made, (held, said) in zip(self.cells, policies, answers, strict=True)
            ]

        questions = list(product(self.lengths, self.tasks, self.depths, modes_of(self.question)))
        count = self.samples * len(questions)
        with enough_memory(f"plan {count:,} questions", "ask for fewer samples, or add to them by later runs"):
            require(count * (len(self.cells) * PER_KEY + PER_BATCH))
        batches = []
        for index in range(self.samples):
            for length, task, depth, mode in questions:
                at = "" if depth is None else f"@{depth:g}"
                keys = [f"{mode}/{task}{at}/{length}/{index}/{cell.key}" for cell in self.cells]
                batches.append(Batch(keys, partial(rows, length, task, depth, mode, index)))
        entries = compressed(min(self.compression), max(self.lengths))
        return Work(self.arguments(), self.methods, entries, batches)


def answer(
    lm: LM, frame: Frame, sample: Sample, mode: str, policies: Sequence[Policy], pattern: Pattern | None = None
) -> list[tuple[Held, dict[str, Any]]]:
    """What every policy kept for the sample, its answer and score, in their order. One prefill serves all."""
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    whole = context + asked
    prompt, after = (whole, []) if mode == "aware" else (context, asked)
    decoding = Decoding(sample.max_new_tokens, stop=FULL_STOP)
    about = {"tokens": len(whole), "prompt": digest(repr(whole)), "answers": sample.answers}
    return [
        (held, {**about, "output": said.text, "score": score(said.text, sample.answers)})
        for held, said in answer_all(lm, policies, prompt, decoding, asked=after, pattern=pattern)
    ]


def _check(lm: LM, plan: Plan) -> None:
    modes_of(plan.question)
    at_least(plan, samples=1)
    pattern_of(plan.prefill)
    for name, values in (("task", plan.tasks), ("length", plan.lengths), ("compression", plan.compression)):
        if not values:
            raise PromptError(f"no {name} is given; name at least one")
    check_compression(plan.compression, min(plan.lengths))
    if max(plan.lengths) > lm.config.max_positions:
        warnings.warn(
            f"length {max(plan.lengths)} exceeds the model's {lm.config.max_positions} positions; the text may degrade",
            RestKVWarning,
            stacklevel=3,
        )
    frame = Frame(lm.tokenizer, plan.chat)
    for length, task, depth in product(plan.lengths, plan.tasks, plan.depths):
        make_sample(task, length, plan.seed, 0, frame, depth)
    for length, cell in product(plan.lengths, plan.cells):
        check(lm, cell.method, compressed(cell.asked, length), length, f"{length} tokens at {cell.asked:g}x")


def _total(arguments: Mapping[str, Any]) -> int:
    cells = 1 + (len(arguments["methods"]) - 1) * len(arguments["compression"])  # the full cache once
    places = len(arguments["tasks"]) * len(arguments["lengths"]) * len(arguments["depths"])
    return arguments["samples"] * places * len(modes_of(arguments["question"])) * cells


GRID: must.Fields = {
    "tasks": must.many(must.name, 1),
    "lengths": must.many(must.whole(1), 1),
    "depths": must.many(must.maybe(must.number(0, 1)), 1),
    "compression": must.many(must.number(1), 1),
    "samples": must.whole(1),
    "question": must.one_of("aware", "agnostic", "both"),
}
PLACED: must.Fields = {
    **must.SCORED,
    "question": must.MODE,
    "length": must.whole(1),
    "depth": must.maybe(must.number(0, 1)),
    "asked": must.number(1),
}
RULER = Benchmark("ruler", "Retrieval (RULER families)", ruler_parts, PLACED, GRID, may_grow="samples", total=_total)
register(RULER)

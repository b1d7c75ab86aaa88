"""Accuracy of every method on RULER's families (bench/quality/tasks.py) at equal bytes, with and without the question in sight.

"aware": context and question are one prompt, and what is evicted is chosen with the question in sight. "agnostic": the
context is compressed first and asked afterwards (restkv.LM.compress). Rankings differ between the two, so every row says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.quality.tasks import Frame, Sample, make_sample, score
from bench.runs.folder import Report, Run, describe, digest, open_run, setting, versions_text
from bench.runs.methods import Method, check, equal_bytes
from bench.runs.plans import Cell, cells_of, check_compression, compressed, modes_of
from bench.runs.together import answer_all, pattern_of
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.patterns import Pattern
from restkv.policies import Policy
from restkv.results import Decoding

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

    def arguments(self, lm: LM) -> dict[str, Any]:
        """JSON-ready."""
        once = any(method.once for method in self.methods)
        return {
            **asdict(self),
            "methods": [method.label for method in self.methods],
            "evict": "prompt" if once else "always",
            **setting(lm),
        }

    @property
    def modes(self) -> tuple[str, ...]:
        return modes_of(self.question)

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.methods, self.compression)

    @property
    def places(self) -> list[tuple[int, str, float | None]]:
        return [(length, task, depth) for length in self.lengths for task in self.tasks for depth in self.depths]

    @property
    def results(self) -> int:
        """How many there will be."""
        return self.samples * len(self.places) * len(self.modes) * len(self.cells)


def run(lm: LM, plan: Plan, folder: Path, kind: str = "ruler", report: Report | None = None) -> Path:
    """Run a plan, or what is missing of it, into a folder (bench/runs/folder.py).

    Raises:
        PolicyError: a method that cannot work with one of the budgets (before anything is run).
        PromptError: a plan without sense, a length too short for a task.
        RunError: see open_run.
    """
    _check(lm, plan)
    details = describe(lm, plan.methods, compressed(min(plan.compression), max(plan.lengths)))
    with open_run(folder, kind, plan.arguments(lm), details, plan.results, report, may_grow="samples") as results:
        _fill(lm, plan, results)
    return folder


def _fill(lm: LM, plan: Plan, results: Run) -> None:
    """Fill a run sample by sample, number by number, so that a broken run has some of everything."""
    frame = Frame(lm.tokenizer, plan.chat)
    budgets, pattern = _Budgets(lm, plan, frame), pattern_of(plan.prefill)

    def rows(length: int, task: str, depth: float | None, mode: str, index: int) -> list[dict[str, Any]]:
        """A sample's answers in all cells, which share its prefill."""
        sample = make_sample(task, length, plan.seed, index, frame, depth)
        policies = [budgets.get(cell, mode, task, length) for cell in plan.cells]
        answers = answer(lm, frame, sample, mode, policies, pattern)
        return [{**_about(sample, mode, cell, plan), **row} for cell, row in zip(plan.cells, answers, strict=True)]

    for index in range(plan.samples):
        for length, task, depth in plan.places:
            at = "" if depth is None else f"@{depth:g}"
            for mode in plan.modes:
                keys = [_key(mode, task, at, length, index, cell) for cell in plan.cells]
                results.add_together(keys, partial(rows, length, task, depth, mode, index))


def _key(mode: str, task: str, at: str, length: int, index: int, cell: Cell) -> str:
    return f"{mode}/{task}{at}/{length}/{index}/{cell.key}"


def _about(sample: Sample, mode: str, cell: Cell, plan: Plan) -> dict[str, Any]:
    return {
        "question": mode,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "index": sample.index,
        "seed": plan.seed,
        "method": cell.method.label,
        "preset": cell.method.preset,
        "compression": cell.asked,
        "versions": versions_text(),
    }


def answer(
    lm: LM, frame: Frame, sample: Sample, mode: str, policies: Sequence[Policy], pattern: Pattern | None = None
) -> list[dict[str, Any]]:
    """The sample's answer under every policy, in their order: output, score and what was kept. One prefill serves all."""
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    whole = context + asked
    prompt, after = (whole, []) if mode == "aware" else (context, asked)
    decoding = Decoding(sample.max_new_tokens, stop=FULL_STOP)
    answers = answer_all(lm, policies, prompt, decoding, asked=after, pattern=pattern)
    name = digest(repr(whole))
    return [
        {
            "granularity": policy.granularity,
            "budget": policy.budget,
            "window": policy.window,
            **held.about(),
            "tokens": len(whole),
            "prompt": name,
            "answers": sample.answers,
            "output": said.text,
            "score": score(said.text, sample.answers),
        }
        for policy, (held, said) in zip(policies, answers, strict=True)
    ]


class _Budgets:
    """The policy of every cell, made when it is first needed.

    Where its budget has to be searched for, that is done on a sample that the run itself does not use (number -1), so that an
    interrupted run finds the same.
    """

    def __init__(self, lm: LM, plan: Plan, frame: Frame) -> None:
        self._lm, self._plan, self._frame = lm, plan, frame
        self._made: dict[tuple[Cell, str, str, int], Policy] = {}

    def get(self, cell: Cell, mode: str, task: str, length: int) -> Policy:
        def prompt() -> list[int]:
            sample = make_sample(task, length, self._plan.seed, -1, self._frame)
            context, asked = self._frame.ids(sample.context, sample.question, sample.answer_prefix)
            return context + asked if mode == "aware" else context

        key = (cell, mode, task, length)
        if key not in self._made:
            pattern = pattern_of(self._plan.prefill)
            self._made[key] = equal_bytes(self._lm, cell.method, compressed(cell.asked, length), prompt, pattern)
        return self._made[key]


def _check(lm: LM, plan: Plan) -> None:
    modes_of(plan.question)
    if plan.samples < 1:
        raise PromptError(f"samples {plan.samples}: give at least 1")
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
    for length in plan.lengths:
        for task in plan.tasks:
            for depth in plan.depths:
                make_sample(task, length, plan.seed, 0, frame, depth)
        for method in plan.methods:
            for compression in plan.compression:
                check(lm, method, compressed(compression, length), length, f"{length} tokens at {compression:g}x")

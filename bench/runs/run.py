"""How every benchmark is run: a plan is checked and cut into batches, and those that a folder does not have are measured.

run(lm, plan, folder)     the whole of it; called again it does what is missing
plan.work(lm)             what is to be done, after the plan has been checked against the model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.runs.benchmark import benchmark
from bench.runs.folder import Report, open_run
from bench.runs.methods import Method, describe, setting
from bench.runs.rows import Row
from restkv.lm import LM


@dataclass(frozen=True)
class Batch:
    """Rows that are measured together, such as the answers of all methods to one question, whose prefill they share.

    Attributes:
        keys: of the rows, as they will be in the file.
        measure: makes all of them, in this order.
    """

    keys: Sequence[str]
    measure: Callable[[], Sequence[Row]]


@dataclass(frozen=True)
class Work:
    """What a plan comes to on a model.

    Attributes:
        arguments: JSON-ready, all that results depend on besides the methods and the model.
        entries: per KV head, of the budget with which the manifest describes the methods' policies.
        batches: in the order of the file.
    """

    arguments: Mapping[str, Any]
    methods: Sequence[Method]
    entries: int
    batches: Sequence[Batch]


class Plan(Protocol):
    """The arguments of a run, as the user gave them."""

    @property
    def kind(self) -> str:
        """The benchmark's name."""

    def work(self, lm: LM) -> Work:
        """Check the plan and say what there is to do; nothing is measured yet.

        Raises:
            PolicyError: a method that cannot work with one of the budgets. PromptError: a plan without sense.
        """


def run(lm: LM, plan: Plan, folder: Path, report: Report | None = None) -> Path:
    """Run a plan, or what is missing of it, into a folder (bench/runs/folder.py)."""
    kind, work = benchmark(plan.kind), plan.work(lm)
    total = sum(len(batch.keys) for batch in work.batches)
    counted = {} if kind.may_grow else {"results": total}
    arguments = {**work.arguments, "methods": [method.label for method in work.methods], **counted, **setting(lm)}
    details = describe(lm, work.methods, work.entries)
    with open_run(folder, kind.name, arguments, details, total, report, kind.may_grow) as results:
        for batch in work.batches:
            results.add_together(batch.keys, batch.measure)
    return folder

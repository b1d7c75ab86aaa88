"""Does compiling pay, operation by operation (`restkv bench compile`)? Eager and compiled sessions side by side.

Each method is measured in three processes (operations.py): one of backend sdpa and one of backend flex, which begins without a
kernel, take turns; the first turn warms up and is left out of the medians. What the first lap of the compiled process took
beyond its median went into compiling. A third process finds the kernels of the second: so long takes compiling when warm.
Finally one process runs random jobs of all methods on a small model and counts the graphs that are made.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import Report, open_run
from bench.runs.methods import Method
from bench.runs.plans import Cell, cells_of
from bench.runs.rows import Row
from bench.runs.together import Held
from bench.speed.contest import Answer, Contest
from bench.speed.operations import OPERATIONS, operations_of
from bench.speed.payoff import pictures, shown
from bench.speed.workers import Process
from modeling.layers import Decoder
from restkv.errors import PromptError
from restkv.evict import Evictor
from restkv.patterns import parse_prefill
from restkv.policies import Policy
from restkv.roots import Roots
from restkv.saving.store import policy_to_dict

EAGER, COMPILED = "sdpa", "flex"
# Laps of a turn; of the decode step as many as tokens are asked for.
LAPS = {"evict": 4, "compact": 4, "score": 1, "prefill": 1}
PLANNED = 4096  # tokens of an answer that sessions prepare for
JOBS_PRESET = "tiny"  # graphs are counted, not timed
MOST_ANSWER = 256  # tokens of a job's answer: two of the default intervals


@dataclass(frozen=True)
class CompilePlan:
    """What is measured, under each of the contest's methods.

    Attributes:
        contest: of one context and batch, without peers; its only `prefill` is a sparse pattern, or "dense" to measure none.
        jobs: random jobs of all methods together; 0: none.
    Raises:
        PromptError: a context that leaves nothing to evict, or is so short that the pattern leaves it dense.
        PolicyError: a method that cannot work with the budget.
    """

    contest: Contest
    jobs: int
    kind: ClassVar[str] = "compile"

    def __post_init__(self) -> None:
        contest = self.contest
        (context,), (prefill,) = contest.contexts, contest.prefills
        if not contest.methods:
            raise PromptError("no method is named; name one, such as restkv")
        if context <= contest.budget:
            raise PromptError(
                f"context {context}: leaves nothing to evict of a budget of {contest.budget}; give a longer one"
            )
        pattern = parse_prefill(prefill)
        if prefill == "chunked" or (pattern is not None and pattern.dense(context)):
            raise PromptError(
                f"prefill {prefill!r}: computes all attention of {context} tokens; give a sparse pattern that does not, such "
                "as a-shape:local=1024, a longer context, or dense to leave it out"
            )
        with torch.device("meta"):
            model = Decoder(contest.config)
        for cell in self.cells:
            Evictor(model, self._policy(cell), Roots(model), [context])

    @property
    def cells(self) -> list[Cell]:
        return cells_of([Method.parse(text) for text in self.contest.methods], [self.contest.budget])

    def _policy(self, cell: Cell) -> Policy:
        return cell.method.policy(self.contest.budget)

    @property
    def shape(self) -> str:
        """The model's, in words."""
        contest = self.contest
        return f"{contest.preset}, random weights" if contest.preset else str(contest.model)

    def measured(self, cell: Cell) -> tuple[str, ...]:
        """Operations that are measured for a cell. Prompts are read alike by all, so that the first cell stands for them."""
        sparse = parse_prefill(self.contest.prefills[0]) is not None
        return operations_of(self._policy(cell), sparse and cell.method.label == self.contest.methods[0])

    def run(self, folder: Path, report: Report | None = None) -> Path:
        """Measure, or what is missing of it, into a folder (bench/runs/folder.py): all of a method, or nothing.

        Raises:
            bench.speed.workers.WorkerDied: a measured process has ended.
        """
        cells, contest = self.cells, self.contest
        batches: list[tuple[list[str], Callable[[], list[Row]]]] = []
        for cell in cells:
            label = cell.method.label
            keys = [f"{label}/{name}" for name in (*self.measured(cell), "decoding")]
            batches.append((keys, partial(self._measure, cell)))
        if self.jobs:
            batches.append(([f"{cell.method.label}/jobs" for cell in cells], self._count_graphs))
        total = sum(len(keys) for keys, _ in batches)
        arguments = {
            "shape": self.shape,
            "context": contest.contexts[0],
            "prefill": contest.prefills[0],
            "jobs": self.jobs,
            **{name: getattr(contest, name) for name in ("dtype", "device", "budget", "rounds", "tokens", "threads")},
            **({} if contest.weights == "auto" else {"weights": contest.weights}),
            "methods": list(contest.methods),
            "results": total,
        }
        config = contest.config
        details = {
            "methods": {cell.method.label: cell.method.describe(contest.budget) for cell in cells},
            "model": {
                "fingerprint": self.shape,
                "layers": config.num_layers,
                "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
                "dtype": contest.dtype,
            },
        }
        with open_run(folder, self.kind, arguments, details, total, report) as results:
            for keys, make in batches:
                results.add_together(keys, make)
        return folder

    # -- one method

    def _measure(self, cell: Cell) -> list[Row]:
        """Its operations and its decoding, one row each."""
        names, began = self.measured(cell), os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="restkv-kernels-") as kernels:
            with ExitStack() as stack:
                both = {
                    backend: stack.enter_context(closing(self._start(cell, backend, kernels)))
                    for backend in (EAGER, COMPILED)
                }
                loading = both[COMPILED].ask("load")
                taken = {name: self._take_turns(both, name) for name in names}
                decoding = {backend: self._decode(process) for backend, process in both.items()}
            compiles = [name for name in names if COMPILED in taken[name]]
            warm = self._first_laps(cell, kernels, compiles)
        load = [round(began, 2), round(os.getloadavg()[0], 2)]
        filled = taken["decode"][EAGER][0]
        held = Held(filled["kept"], filled["cache_bytes"])
        tokens = {
            "evict": decoding[EAGER]["interval"],
            "compact": decoding[EAGER]["period"],
            "decode": 1,
            "score": self.contest.contexts[0],
            "prefill": self.contest.contexts[0],
        }
        rows = []
        seconds = {"cold": loading["seconds"][0], "warm": warm["load"]}  # of all that decoding compiles
        for name in names:
            measures = self._summary(name, taken[name], warm.get(name))
            measures |= {"tokens": tokens[name], "load_average": load}
            if name in ("evict", "decode") and name in compiles:
                seconds["cold"] += measures["cold_s"]
                seconds["warm"] += measures["warm_s"]
            rows.append(self._row(cell, held, {"part": "operation", "operation": name}, measures))
        figures = {
            f"{who}_{name}": decoding[backend][name]
            for who, backend in (("eager", EAGER), ("compiled", COMPILED))
            for name in ("tokens", "step_ms", "token_ms")
        }
        measures = {
            **figures,
            "evicts": "compiled" if "evict" in compiles else "eager",
            "cold_s": seconds["cold"],
            "warm_s": seconds["warm"],
            "load_average": load,
        }
        return [*rows, self._row(cell, held, {"part": "decoding"}, measures)]

    def _start(self, cell: Cell, backend: str, kernels: str) -> Process:
        arguments = self.contest.ours(cell.method.label, self.contest.prefills[0])
        arguments |= {"backend": backend, "tokens": PLANNED}
        return self._process(f"{cell.method.label}, {backend}", arguments, {"TORCHINDUCTOR_CACHE_DIR": kernels})

    def _process(self, name: str, arguments: Mapping[str, Any], environment: dict[str, str] | None = None) -> Process:
        return Process(name, "bench.speed.operations", [json.dumps(arguments)], None, self.contest.threads, environment)

    def _fill(self, process: Process) -> Answer:
        return process.ask("fill", context=self.contest.contexts[0], batch=1)

    def _ask(self, process: Process, name: str, laps: int) -> Answer:
        values = {"score": ("context",), "prefill": ("context", "batch")}.get(name, ())
        at = {"context": self.contest.contexts[0], "batch": 1}
        return process.ask(name, tokens=laps, **{value: at[value] for value in values})

    def _take_turns(self, both: Mapping[str, Process], name: str) -> dict[str, list[Answer]]:
        """What each process says of a cache before the first turn and after every turn; the first turn warms up. Of the compiled
        process only where it compiles this."""
        taken = {backend: [self._fill(process)] for backend, process in both.items()}
        if name not in taken[COMPILED][0]["compiles"]:
            del taken[COMPILED]
        for _ in range(self.contest.rounds + 1):
            for backend, answers in taken.items():
                answers.append(self._ask(both[backend], name, LAPS.get(name, self.contest.tokens)))
        if name not in taken.get(COMPILED, taken[EAGER])[-1]["compiles"]:  # it was tried, and given up
            taken.pop(COMPILED, None)
        return taken

    def _summary(self, name: str, taken: Mapping[str, Sequence[Answer]], warm: float | None) -> dict[str, Any]:
        """What the answers of all turns come to; `warm`: seconds of the first lap where the kernels are there."""
        measures: dict[str, Any] = {}
        for who, backend in (("eager", EAGER), ("compiled", COMPILED)):
            laps = [lap for answer in taken.get(backend, ())[2:] for lap in _laps(name, answer)]
            low, middle, high = _quartiles(laps) if laps else (None, None, None)
            measures |= {f"{who}_ms": middle, f"{who}_quartiles_ms": None if low is None else [low, high]}
        measures |= {"laps": LAPS.get(name, self.contest.tokens) * self.contest.rounds}
        measures |= {"warm_up": LAPS.get(name, self.contest.tokens)}
        if COMPILED not in taken:
            return measures | {"cold_s": None, "warm_s": None, "graphs": 0}
        filled, first, *_, last = taken[COMPILED]
        usual = measures["compiled_ms"] / 1e3
        return measures | {
            "cold_s": max(0.0, _laps(name, first)[0] - usual),
            "warm_s": max(0.0, (warm or 0.0) - usual),
            "graphs": last["graphs"] - filled["graphs"],
        }

    def _decode(self, process: Process) -> dict[str, Any]:
        """Milliseconds of a token over whole periods, with what its evictions took and without."""
        filled = self._fill(process)
        process.ask("decode", tokens=self.contest.tokens)
        period = filled["period"] or 1
        tokens = period * -(-self.contest.tokens // period)
        answer = process.ask("decode", tokens=tokens)
        whole, step = (1e3 * sum(laps) / tokens for laps in (answer["seconds"], _laps("decode", answer)))
        interval = filled["interval"] or 1
        return {"token_ms": whole, "step_ms": step, "tokens": tokens, "period": period, "interval": interval}

    def _first_laps(self, cell: Cell, kernels: str, names: Sequence[str]) -> dict[str, float]:
        """Seconds of the first lap of every operation in a process that finds its kernels made."""
        with closing(self._start(cell, COMPILED, kernels)) as process:
            took = {"load": process.ask("load")["seconds"][0]}
            for name in names:
                self._fill(process)
                took[name] = _laps(name, self._ask(process, name, 1))[0]
        return took

    # -- graphs

    def _count_graphs(self) -> list[Row]:
        """Graphs of random jobs, by the method that made them: in its first job, and in all later ones."""
        cells, contest, dice = self.cells, self.contest, random.Random(0)
        arguments = replace(contest, preset=JOBS_PRESET, model=None, backend=COMPILED).ours(contest.methods[0], "dense")
        policies = {cell: self._policy(cell) for cell in cells}
        first: dict[Cell, int] = {}
        later, jobs = dict.fromkeys(cells, 0), dict.fromkeys(cells, 0)
        kept: dict[Cell, Held] = {}
        graphs, began = 0, os.getloadavg()[0]
        with closing(self._process("jobs", arguments)) as process:

            def job(cell: Cell, context: int, answer: int) -> int:
                """How many graphs it has made."""
                nonlocal graphs
                said = process.ask("job", policy=policy_to_dict(policies[cell]), context=context, answer=answer)
                made, graphs = said["graphs"] - graphs, said["graphs"]
                kept[cell] = Held(said["kept"], said["cache_bytes"])
                return made

            for cell in cells:  # over the budget, and beyond an eviction
                interval = min(policies[cell].interval or 0, MOST_ANSWER)
                first[cell] = job(cell, 2 * contest.budget, 2 * interval + 2)
            for _ in range(self.jobs):
                cell = dice.choice(cells)
                jobs[cell] += 1
                later[cell] += job(cell, _some(dice, 4 * contest.budget), _some(dice, MOST_ANSWER))
        load = [round(began, 2), round(os.getloadavg()[0], 2)]
        return [
            self._row(
                cell,
                kept[cell],
                {"part": "jobs"},
                {"jobs": jobs[cell], "graphs": first[cell], "new_graphs": later[cell], "load_average": load},
            )
            for cell in cells
        ]

    def _row(self, cell: Cell, held: Held, about: Mapping[str, Any], measures: Mapping[str, Any]) -> Row:
        return cell.row(self.contest.budget, self._policy(cell), held, about, measures)


def _laps(name: str, answer: Answer) -> list[float]:
    """Seconds of every lap; of a decode step without the evictions that followed it."""
    if name != "decode":
        return answer["seconds"]
    return [lap - evicting for lap, evicting in zip(answer["seconds"], answer["evicting"], strict=True)]


def _quartiles(laps: Sequence[float]) -> tuple[float, float, float]:
    """In milliseconds; of few laps, too, none is outside of what was measured."""
    low, middle, high = statistics.quantiles(laps if len(laps) > 1 else 2 * list(laps), n=4, method="inclusive")
    return 1e3 * low, 1e3 * middle, 1e3 * high


def _some(dice: random.Random, most: int) -> int:
    """1 ... most, small numbers as often as large ones."""
    return min(most, int(math.exp(dice.uniform(0, math.log(most + 1)))))


_TIME, _SECONDS = must.number(0), must.maybe(must.number(0))
_LOAD = {"load_average": must.many(must.number(0), 2)}
ROWS = {
    "operation": {
        "operation": must.one_of(*OPERATIONS),
        "tokens": must.whole(1),
        "laps": must.whole(1),
        "warm_up": must.whole(1),
        "eager_ms": _TIME,
        "eager_quartiles_ms": must.many(_TIME, 2),
        "compiled_ms": must.maybe(_TIME),
        "compiled_quartiles_ms": must.maybe(must.many(_TIME, 2)),
        "cold_s": _SECONDS,
        "warm_s": _SECONDS,
        "graphs": must.whole(),
        **_LOAD,
    },
    "decoding": {
        **dict.fromkeys(("eager_tokens", "compiled_tokens"), must.whole(1)),
        **dict.fromkeys(("eager_step_ms", "eager_token_ms", "compiled_step_ms", "compiled_token_ms"), _TIME),
        "evicts": must.one_of("compiled", "eager"),
        "cold_s": _TIME,
        "warm_s": _TIME,
        **_LOAD,
    },
    "jobs": {"jobs": must.whole(), "graphs": must.whole(), "new_graphs": must.whole(), **_LOAD},
}
ARGUMENTS = {
    "shape": must.name,
    "dtype": must.name,
    "context": must.whole(1),
    "budget": must.whole(1),
    "threads": must.whole(1),
    "rounds": must.whole(1),
    "jobs": must.whole(),
}
register(Benchmark("compile", "Does compiling pay?", shown, ROWS, ARGUMENTS, pictures=pictures))

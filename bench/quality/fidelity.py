"""How far a compressed cache is from the full one on any text, token by token, with the text itself as teacher.

A text is cut into windows of `context` + `tail` tokens; or windows are questions of bench/quality/tasks.py, whose prompt is the
context and whose expected answer is the tail. Of every window the context is prefilled (once for all methods that look at
it alike) and evicted, the tail is fed, and each next-token distribution is compared with the full cache's
(kl, top1 and nll of bench/quality/distance.py; perplexity ratio = exp(mean nll - mean full_nll)). Methods read the tail
side by side and in one piece; one that evicts within it (by its interval) reads alone, token by token. If asked for,

    error   per layer, ||O - O_full|| / ||O_full|| of the attention's output (after W_O) over the tail's queries

which is that of the eviction alone: the full run's own queries, keys and values, less the context's entries
that were evicted after the prompt, so that errors of earlier layers do not add up in it. It is computed outside of the model
(bench/quality/outputs.py). Policies that renumber positions have none.

Letters: H query heads, P context.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.quality.distance import Judged, Told, read
from bench.quality.kept import kept_masks
from bench.quality.oracle import Oracle
from bench.quality.outputs import LayerTrace, full_pass, observation, tail_errors
from bench.quality.prose import require_room
from bench.quality.tasks import Frame, make_sample, parted
from bench.report.fidelity import SETS, fidelity_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import digest
from bench.runs.methods import Method, check, equal_bytes
from bench.runs.plans import Asked, Cell, at_least, cells_of, distinct, share
from bench.runs.rows import Row
from bench.runs.run import Batch, Work
from bench.runs.together import Held, Together, answer_together, pattern_of, prefill_all
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.policies import Policy


@dataclass(frozen=True)
class Questions:
    """Retrieval questions (bench/quality/tasks.py) with the question in sight; their expected answers are teacher-forced."""

    tasks: tuple[str, ...]
    seed: int = 0

    def windows(self, lm: LM, length: int, number: int) -> list[Passage]:
        """The first `number` samples of every task, by turns."""
        require_room(number * len(self.tasks) * length, length)
        frame, made = Frame(lm.tokenizer), []
        for index in range(number):
            for task in self.tasks:
                sample = make_sample(task, length, self.seed, index, frame)
                prompt = f"{sample.context} {sample.question} {sample.answer_prefix}"
                start, answer = parted(lm.encode(f"{prompt}{sample.target}."), lm.encode(prompt))
                made.append(Passage(f"{task}/{index}", start + answer, len(start), length))
        return made


@dataclass(frozen=True)
class FidelityPlan:
    """The arguments of a run.

    Attributes:
        source: what is read: a text, of which only the hash goes into the manifest, or questions.
        budgets: entries per KV head (whole numbers), or fractions of the context.
        context: tokens; of questions, with the room for the answer, as `length` of make_sample.
        tail: tokens compared; questions have as many as their answers.
        windows: how many, spread evenly over the text; of questions, so many of each task.
        oracle: so many windows (of each task) are compared with greedy backward elimination (0: none).
        oracle_context: their context, short because elimination is slow.
        prefill: "dense", or the sparse pattern with which the contexts are read, as text (restkv/patterns.py). The reference is
            dense either way, so that the full cache's row shows what the pattern alone costs.
        layer_errors: also of every layer's attention output, by one more pass over each window and some of float64.
    """

    source: str | Questions
    methods: tuple[Method, ...]
    budgets: tuple[Asked, ...]
    context: int = 384
    tail: int = 64
    windows: int = 16
    oracle: int = 0
    oracle_context: int = 128
    prefill: str = "dense"
    layer_errors: bool = False
    kind: ClassVar[str] = "fidelity"

    @property
    def cells(self) -> list[Cell]:
        return distinct(cells_of(self.methods, self.budgets), self.context)

    @property
    def oracle_cells(self) -> list[Cell]:
        """Those that evict something of an oracle's context."""
        cells = distinct(cells_of(self.methods, self.budgets), self.oracle_context)
        return [cell for cell in cells if share(cell.asked, self.oracle_context) < self.oracle_context]

    def arguments(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("context", "tail", "windows", "layer_errors", "oracle", "oracle_context", "prefill")
        plain = {name: getattr(self, name) for name in names} | {"budgets": list(self.budgets)}
        if isinstance(self.source, str):
            return plain | {"text": digest(self.source)}
        return plain | {"tasks": list(self.source.tasks), "seed": self.source.seed, "tail": None}

    def work(self, lm: LM) -> Work:
        """Window by window; those that the oracle is run on are followed by it. See bench.runs.run.Plan."""
        _check(lm, self)
        if isinstance(self.source, str):
            windows = _cut(lm, self, self.source)
            oracles = [window.shortened(self.oracle_context) for window in windows[: self.oracle]]
        else:
            windows = self.source.windows(lm, self.context, self.windows)
            oracles = self.source.windows(lm, self.oracle_context, self.oracle)
        first = {window.asked: window.prompt for window in (*reversed(oracles), *reversed(windows))}
        pattern = pattern_of(self.prefill)

        @cache
        def policy(cell: Cell, asked: int) -> Policy:
            """A budget that has to be searched for is found on the first window of its length, so that an interrupted run finds
            the same."""
            return equal_bytes(lm, cell.method, share(cell.asked, asked), lambda: first[asked], pattern)

        def prefilled(window: Passage, cells: Sequence[Cell]) -> list[Together]:
            policies = [policy(cell, window.asked) for cell in cells]
            groups = answer_together(lm, policies, window.context, window.tail + 1, extends=True)
            prefill_all(lm, groups, window.prompt, pattern)
            return groups

        compare = partial(_compare_all, layer_errors=self.layer_errors, dense=pattern is None)
        short, batches = {window.name: window for window in oracles}, []
        for window in windows:
            parts: list[tuple[str, Passage, Sequence[Cell], Callable[..., list[Row]]]]
            parts = [("text", window, self.cells, compare)]
            if window.name in short:
                parts.append(("oracle", short[window.name], self.oracle_cells, _oracle_gaps))
            for part, passage, cells, measure in parts:
                keys = [f"{part}/{passage.name}/{cell.method.label}/{cell.asked!r}" for cell in cells]
                batches.append(Batch(keys, partial(measure, lm, passage, cells, prefilled)))
        return Work(self.arguments(), self.methods, max(share(asked, self.context) for asked in self.budgets), batches)


@dataclass(frozen=True)
class Passage:
    """Token ids: a context, what is fed after it, and one more that is only expected.

    Attributes:
        asked: the tokens that budgets are shares of; a question's prompt has a few less than were asked for.
    """

    name: str
    ids: list[int]
    context: int
    asked: int

    @property
    def tail(self) -> int:
        return len(self.ids) - 1 - self.context

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.context]

    def shortened(self, context: int) -> Passage:
        return Passage(self.name, self.ids[: context + self.tail + 1], context, context)


def _check(lm: LM, plan: FidelityPlan) -> None:
    at_least(plan, context=2, tail=1, windows=1, oracle=0, oracle_context=2)
    if plan.oracle and (plan.oracle > plan.windows or plan.oracle_context > plan.context):
        raise PromptError(
            f"oracle {plan.oracle} of {plan.oracle_context} tokens: give no more than windows and context"
        )
    pattern_of(plan.prefill)
    for method in plan.methods:
        for budget in plan.budgets:
            for context in {plan.context, plan.oracle_context} if plan.oracle else {plan.context}:
                check(lm, method, share(budget, context), context, f"budget {budget} of {context} tokens")


def _cut(lm: LM, plan: FidelityPlan, text: str) -> list[Passage]:
    """Windows of a text, each beginning with what the tokenizer puts before a prompt."""
    before, ids = lm.tokenizer.encode(""), lm.tokenizer.encode(text, bos=False)
    size = plan.context + plan.tail + 1 - len(before)
    if len(ids) < size:
        raise PromptError(f"the text has {len(ids)} tokens; a window takes {size}: give more text, or less --context")
    room = len(ids) - size
    if room + 1 < plan.windows:
        raise PromptError(f"the text has room for {room + 1} different windows, not for {plan.windows}; give more text")
    if room < (plan.windows - 1) * size:
        warnings.warn(
            f"the text has {len(ids)} tokens: {plan.windows} windows of {size} overlap, so that intervals come out too narrow",
            RestKVWarning,
            stacklevel=3,
        )
    starts = [round(i * room / max(plan.windows - 1, 1)) for i in range(plan.windows)]
    cuts = [lm.encode(before + ids[start : start + size]) for start in starts]
    return [Passage(str(i), cut, plan.context, plan.context) for i, cut in enumerate(cuts)]


Prefilled = Callable[[Passage, Sequence[Cell]], Sequence[Together]]  # rows that hold what each cell leaves of a window


@torch.no_grad()
def _compare_all(
    lm: LM, window: Passage, cells: Sequence[Cell], prefilled: Prefilled, layer_errors: bool, dense: bool
) -> list[Row]:
    """How far every cell is from the full cache over the window's tail.

    Args:
        dense: the context was read densely, so that the first cell, the full cache, is what all are compared with.
    """
    first, *rest = window.ids[window.context :]
    told = Told(torch.tensor(rest, device=lm.device))
    layers: list[LayerTrace] = []
    if layer_errors or not dense or not cells[0].method.full:
        logits_TV, layers = full_pass(lm, window.ids[:-1], window.tail)
        told.see(0, logits_TV.double().log_softmax(-1))
    groups = prefilled(window, cells)
    errors = errors_by_layer(lm, groups, layers, window.context) if layer_errors else {}  # before the tail is fed
    measures: dict[int, dict[str, Any]] = {}
    held = {about: has for group in groups for about, has in zip(group.about, group.held(), strict=True)}
    for group in groups:
        judged = [Judged(told) for _ in group.about]
        if told.pieces:
            read(group.session, [first], rest, judged)
        else:
            read(group.session, [first], rest, [told])
            judged[0].see(0, told.log_TV)
        group.session.cache.free()
        for about, one in zip(group.about, judged, strict=True):
            measures[about] = {**one.measures(), "error": errors.get(about)}
    return _rows("text", window, cells, groups, held, measures)


@torch.no_grad()
def _oracle_gaps(lm: LM, window: Passage, cells: Sequence[Cell], prefilled: Prefilled) -> list[Row]:
    """How far every cell is from what greedy elimination would have kept of the window's context."""
    _, layers = full_pass(lm, window.ids[:-1], window.context + window.tail)
    oracle = Oracle(lm, layers, window.context)
    held: dict[int, Held] = {}
    measures: dict[int, dict[str, Any]] = {}
    groups = prefilled(window, cells)
    for group in groups:
        held |= zip(group.about, group.held(), strict=True)
        for row, (about, policy) in enumerate(zip(group.about, group.policies, strict=True)):
            measures[about] = oracle.gap(group.session, policy, row)
        group.session.cache.free()
    return _rows("oracle", window, cells, groups, held, measures)


def _rows(
    part: str,
    window: Passage,
    cells: Sequence[Cell],
    groups: Sequence[Together],
    held: Mapping[int, Held],
    measures: Mapping[int, Mapping[str, Any]],
) -> list[Row]:
    """In the order of the cells, by whose numbers the rest is known."""
    policies = {about: policy for group in groups for about, policy in zip(group.about, group.policies, strict=True)}
    about = {"part": part, "window": window.name}
    return [
        cell.row(share(cell.asked, window.asked), policies[number], held[number], about, measures[number])
        for number, cell in enumerate(cells)
    ]


def errors_by_layer(
    lm: LM, groups: Sequence[Together], layers: Sequence[LayerTrace], context: int
) -> dict[int, list[float] | None]:
    """By the numbers of the rows: relative error of every layer's attention output over the tail; None where positions are
    renumbered."""
    found: dict[int, list[float] | None] = {}
    masks: dict[int, list[Tensor]] = {}
    for group in groups:
        for row, (about, policy) in enumerate(zip(group.about, group.policies, strict=True)):
            found[about] = None
            if not policy.slot_positions:
                masks[about] = kept_masks(group.session, context, row)
    of_layers = []
    for index, trace in enumerate(layers):
        obs = observation(lm, index, trace, trace.k_KLD.shape[1])
        of_layers.append(tail_errors(lm, obs, [layer_masks[index] for layer_masks in masks.values()]))
    return found | {about: list(errors) for about, errors in zip(masks, zip(*of_layers, strict=True), strict=True)}


TEXT: must.Fields = {
    "entries": must.maybe(must.whole()),
    **{name: must.number() for name in ("kl", "nll", "full_nll")},
    "top1": must.SCORE,
    "error": must.maybe(must.LAYERS),
}
ORACLE: must.Fields = {"entries": must.whole(), **{name: must.maybe(must.LAYERS) for name in (*dict(SETS), "overlap")}}
register(
    Benchmark(
        "fidelity",
        "Fidelity to the full cache",
        fidelity_parts,
        {"text": TEXT, "oracle": ORACLE},
        {"context": must.whole(1), "oracle_context": must.whole(1)},
    )
)

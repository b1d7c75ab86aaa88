"""How far a compressed cache is from the full one on any text, token by token, with the text itself as teacher.

A text is cut into windows of `context` + `tail` tokens; or windows are questions of bench/quality/tasks.py, whose prompt is the
context and whose expected answer is the tail. Of every window the context is prefilled and evicted, the tail is fed one
token at a time (with the evictions of the policy's interval, if it has one), and each next-token distribution is compared
with the full cache's:

    kl      KL(full || method), nats per token
    top1    share of tokens whose most likely successor is the same
    nll     negative log-likelihood of the true next token, nats; perplexity ratio = exp(mean nll - mean full_nll)
    error   per layer, ||O - O_full|| / ||O_full|| of the attention's output (after W_O) over the tail's queries

The layer error is that of the eviction alone: the full run's own queries, keys and values, less the context's entries
that were evicted after the prompt, so that errors of earlier layers do not add up in it. It is computed outside of the model
(bench/quality/outputs.py). Policies that renumber positions have none.

Letters: H query heads, P context, T tail, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quality.kept import kept_masks
from bench.quality.oracle import Oracle
from bench.quality.outputs import LayerTrace, full_pass, observation, relative_error
from bench.quality.tasks import Frame, make_sample, parted
from bench.runs.folder import Report, Run, describe, digest, open_run, setting, versions_text
from bench.runs.methods import Method, check, equal_bytes
from bench.runs.plans import Asked, Cell, cells_of, distinct, share
from bench.runs.together import kept_mean, pattern_of, prefill_together
from restkv.errors import PromptError, RestKVWarning
from restkv.generate import Session
from restkv.lm import LM
from restkv.policies import Policy


@dataclass(frozen=True)
class Questions:
    """Retrieval questions (bench/quality/tasks.py) with the question in sight; their expected answers are teacher-forced."""

    tasks: tuple[str, ...]
    seed: int = 0

    def windows(self, lm: LM, length: int, number: int) -> list[Passage]:
        """The first `number` samples of every task, by turns.

        Raises:
            PromptError: an unknown task, or a length too short for one.
        """
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
    """

    source: str | Questions
    methods: tuple[Method, ...]
    budgets: tuple[Asked, ...]
    context: int = 384
    tail: int = 64
    windows: int = 16
    oracle: int = 4
    oracle_context: int = 128
    prefill: str = "dense"

    @property
    def cells(self) -> list[Cell]:
        return distinct(cells_of(self.methods, self.budgets), self.context)

    @property
    def oracle_cells(self) -> list[Cell]:
        """Those that evict something of an oracle's context."""
        cells = distinct(cells_of(self.methods, self.budgets), self.oracle_context)
        return [cell for cell in cells if share(cell.asked, self.oracle_context) < self.oracle_context]

    @property
    def results(self) -> int:
        """How many there will be."""
        tasks = len(self.source.tasks) if isinstance(self.source, Questions) else 1
        return tasks * (self.windows * len(self.cells) + self.oracle * len(self.oracle_cells))

    def arguments(self, lm: LM) -> dict[str, Any]:
        """JSON-ready."""
        plain = {
            name: getattr(self, name) for name in ("context", "tail", "windows", "oracle", "oracle_context", "prefill")
        }
        if isinstance(self.source, str):
            plain["text"] = digest(self.source)
        else:
            plain |= {"tasks": list(self.source.tasks), "seed": self.source.seed, "tail": None}
        return plain | {
            "methods": [method.label for method in self.methods],
            "budgets": list(self.budgets),
            "results": self.results,
            **setting(lm),
        }


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


def run_fidelity(lm: LM, plan: FidelityPlan, folder: Path, report: Report | None = None) -> Path:
    """Run the plan, or what is missing of it, into a folder (bench/runs/folder.py).

    Raises:
        PolicyError: a method that cannot work with one of the budgets. PromptError: the text or a length is too short, or a plan
        without sense. RunError: see open_run.
    """
    _check(lm, plan)
    if isinstance(plan.source, str):
        windows = _cut(lm, plan, plan.source)
        oracles = [_shortened(window, plan.oracle_context) for window in windows[: plan.oracle]]
    else:
        windows = plan.source.windows(lm, plan.context, plan.windows)
        oracles = plan.source.windows(lm, plan.oracle_context, plan.oracle)
    details = describe(lm, plan.methods, max(share(budget, plan.context) for budget in plan.budgets))
    with open_run(folder, "fidelity", plan.arguments(lm), details, plan.results, report) as results:
        _fill(lm, plan, windows, oracles, results)
    return folder


def _check(lm: LM, plan: FidelityPlan) -> None:
    for name, least in (("context", 2), ("tail", 1), ("windows", 1), ("oracle", 0), ("oracle_context", 2)):
        if getattr(plan, name) < least:
            raise PromptError(f"{name} {getattr(plan, name)}: give at least {least}")
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


def _shortened(window: Passage, context: int) -> Passage:
    return Passage(window.name, window.ids[: context + window.tail + 1], context, context)


@torch.no_grad()
def _fill(lm: LM, plan: FidelityPlan, windows: Sequence[Passage], oracles: Sequence[Passage], results: Run) -> None:
    policies: dict[tuple[Cell, int], Policy] = {}
    pattern = pattern_of(plan.prefill)

    def sessions(missing: Sequence[Cell], window: Passage) -> list[Session]:
        """One per cell, prefilled; budgets that must be searched for are found on the first window of this length."""
        for cell in missing:
            if (cell, window.asked) not in policies:
                entries = share(cell.asked, window.asked)
                policies[cell, window.asked] = equal_bytes(
                    lm, cell.method, entries, lambda: first[window.asked], pattern
                )
        made = [Session(lm.engine, policies[cell, window.asked], [window.context], window.tail) for cell in missing]
        prefill_together(lm, made, window.prompt, pattern)
        return made

    first = {window.asked: window.prompt for window in (*reversed(oracles), *reversed(windows))}
    short = {window.name: window for window in oracles}
    for window in windows:
        keys = {cell: f"text/{window.name}/{cell.method.label}/{cell.asked!r}" for cell in plan.cells}
        missing = [cell for cell in plan.cells if keys[cell] not in results.done]
        if missing:
            logits_TV, layers = full_pass(lm, window.ids[:-1], window.tail)
            for cell, session in zip(missing, sessions(missing, window), strict=True):
                about = _about("text", window, cell, session)  # before the tail is fed
                error = layer_errors(lm, session, layers, window.context)
                compared = compare(lm, session, window.ids[window.context :], logits_TV)
                results.add(keys[cell], {**about, **compared, "error": error})
                session.cache.free()
        if window.name not in short:
            continue
        window = short[window.name]
        keys = {cell: f"oracle/{window.name}/{cell.method.label}/{cell.asked!r}" for cell in plan.oracle_cells}
        missing = [cell for cell in plan.oracle_cells if keys[cell] not in results.done]
        if missing:
            _, layers = full_pass(lm, window.ids[:-1], window.context + window.tail)
            oracle = Oracle(lm, layers, window.context)
            for cell, session in zip(missing, sessions(missing, window), strict=True):
                results.add(keys[cell], {**_about("oracle", window, cell, session), **oracle.gap(session)})
                session.cache.free()


def _about(part: str, window: Passage, cell: Cell, session: Session) -> dict[str, Any]:
    policy = session.policy
    return {
        "part": part,
        "window": window.name,
        "method": cell.method.label,
        "preset": cell.method.preset,
        "granularity": policy.granularity,
        "asked": cell.asked,
        "entries": share(cell.asked, window.asked),
        "budget": policy.budget,
        "observed": policy.window,
        "kept": round(kept_mean(session), 3),
        "bytes": session.cache.live_bytes,
        "versions": versions_text(),
    }


@torch.no_grad()
def compare(lm: LM, session: Session, tail: Sequence[int], full_TV: Tensor) -> dict[str, float]:
    """Feed all but the last token of the tail; compare what is expected after each with the full cache's logits [T, V]."""
    steps = []
    for token in tail[:-1]:
        session.feed(torch.tensor([token], device=lm.device))
        steps.append(session.logits_BV[0])
    log_TV, full_TV = (logits.double().log_softmax(-1) for logits in (torch.stack(steps), full_TV))
    truth_T1 = torch.tensor(tail[1:], device=lm.device)[:, None]
    return {
        "kl": float((full_TV.exp() * (full_TV - log_TV)).sum(-1).mean()),
        "top1": float((log_TV.argmax(-1) == full_TV.argmax(-1)).double().mean()),
        "nll": float(-log_TV.gather(1, truth_T1).mean()),
        "full_nll": float(-full_TV.gather(1, truth_T1).mean()),
    }


def layer_errors(lm: LM, session: Session, layers: Sequence[LayerTrace], context: int) -> list[float] | None:
    """Relative error of every layer's attention output over the tail; None where positions are renumbered."""
    if session.policy.slot_positions:
        return None
    errors = []
    for index, (trace, keep_HP) in enumerate(zip(layers, kept_masks(session, context), strict=True)):
        obs = observation(lm, index, trace, trace.k_KLD.shape[1])
        tail_HT = keep_HP.new_ones(len(keep_HP), trace.k_KLD.shape[1] - context)
        errors.append(relative_error(lm, obs, torch.cat([keep_HP, tail_HT], 1)))
    return errors

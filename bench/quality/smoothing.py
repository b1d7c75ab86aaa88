"""Does ReST-KV's smoothing pay? ReST-KV, ReST-KV without each of its parts, and its rivals, from mild to extreme compression,
on perplexity and on classification.

Perplexity is that of the "prefill" protocol (bench/quality/perplexity.py), classification that of bench/quality/choice.py. No
method evicts after the prompt, so that what is compared is what they keep of it, and so that all of them share its prefill.
Without data of the user's the texts are generated prose (bench/quality/prose.py), and the classification is between values told
in a context.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.quality.anli import anli_items
from bench.quality.choice import choice_rows, fill_choices, shortest, told_items
from bench.quality.corpus import Document, prose
from bench.quality.perplexity import Protocol, fill_perplexity, texts_digest
from bench.runs.folder import Report, describe, digest, open_run, setting
from bench.runs.methods import Method, check
from bench.runs.plans import Cell, cells_of, check_compression, compressed, modes_of
from restkv.errors import PolicyError, PromptError, RestKVWarning
from restkv.lm import LM

SUBJECT = "restkv@paper"
# What the paper's ReST-KV is without its parts: temporal smoothing, spatial smoothing, both, the output term, the output
# projection; its other order of averaging; one budget for the whole model, and that without the EMA, which is our default.
# Then its rivals, without any output term.
ARMS = (
    f"{SUBJECT},{SUBJECT}:alpha=none,{SUBJECT}:pooling=none,{SUBJECT}:alpha=none:pooling=none,{SUBJECT}:tau=0,"
    f"{SUBJECT}:output_weight=False,{SUBJECT}:aggregate=indicator,{SUBJECT}:budget_by=global,restkv,"
    "snapkv,h2o,tova,streamingllm,lacache"
)


@dataclass(frozen=True)
class SmoothingPlan:
    """The arguments of a run.

    Attributes:
        compression: tokens of the prompt over entries per KV head.
        documents: texts for perplexity; None: generated prose.
        length: tokens of context, of a window and of a generated question alike.
        tail: tokens scored after a window's context.
        windows, samples: how many windows, and how many generated questions of each task (or ANLI samples per round).
        anli: folder of ANLI (bench/quality/anli.py); None: generated questions.
        shots: worked examples before each ANLI premise.
        question: aware, agnostic or both.
    """

    methods: tuple[Method, ...]
    compression: tuple[float, ...]
    documents: tuple[Document, ...] | None = None
    length: int = 1024
    tail: int = 128
    windows: int = 48
    anli: Path | None = None
    shots: int = 16
    samples: int = 100
    question: str = "both"
    seed: int = 0


def run_smoothing(lm: LM, plan: SmoothingPlan, folder: Path, report: Report | None = None) -> Path:
    """Run the plan, or what is missing of it, into a folder (bench/runs/folder.py).

    A compression that leaves a method fewer entries than it can work with is left out, and said to be (RestKVWarning).

    Raises:
        PromptError: a plan without sense, data that cannot be read or are too short. PolicyError: a method that can work with
        none of the compressions. RunError: see open_run.
    """
    least = {"length": 2, "tail": 2, "windows": 1, "samples": 1}
    for name, bound in least.items():
        if getattr(plan, name) < bound:
            raise PromptError(f"{name} {getattr(plan, name)}: give at least {bound}")
    check_compression(plan.compression, plan.length)
    modes, protocol = modes_of(plan.question), Protocol("prefill", plan.tail, plan.length)
    documents = plan.documents or (prose(lm.tokenizer, plan.windows * (plan.length + plan.tail), plan.seed),)
    windows = protocol.windows(lm, documents, plan.windows)
    if plan.anli is None:
        items = told_items(lm.tokenizer, plan.length, plan.samples, plan.seed)
    else:
        items = anli_items(plan.anli, shots=plan.shots, limit=plan.samples, seed=plan.seed)
    cells = cells_of(plan.methods, plan.compression)
    reading, left_out = _workable(lm, cells, plan.length)
    choosing, also_out = _workable(lm, cells, shortest(lm, items, modes))
    for what, out in (("perplexity", left_out), ("classification", also_out)):
        if out:
            warnings.warn(f"{what}: too few entries, left out: {', '.join(out)}", RestKVWarning, stacklevel=2)
    arguments = {
        "methods": [method.label for method in plan.methods],
        "compression": list(plan.compression),
        "text": "generated prose" if plan.documents is None else texts_digest(documents),
        "length": plan.length,
        "tail": plan.tail,
        "windows": len(windows),
        "tasks": list(dict.fromkeys(item.task for item in items)),
        "questions": "generated" if plan.anli is None else digest(repr(items)),
        "shots": 0 if plan.anli is None else plan.shots,
        "samples": plan.samples,
        "question": plan.question,
        "seed": plan.seed,
        "left out": [*left_out, *(f"{name} (classification)" for name in also_out if name not in left_out)],
        "results": len(windows) * len(reading) + choice_rows(items, modes, choosing),
        **setting(lm),
    }
    details = describe(lm, plan.methods, compressed(min(plan.compression), plan.length))
    with open_run(folder, "smoothing", arguments, details, arguments["results"], report) as results:
        fill_perplexity(lm, windows, protocol, reading, compressed, results)
        fill_choices(lm, items, modes, choosing, compressed, results, once=True)
    return folder


def _workable(lm: LM, cells: Sequence[Cell], length: int) -> tuple[list[Cell], list[str]]:
    """The cells whose method can work with what a prompt of `length` tokens leaves it, and the names of the others."""
    good: list[Cell] = []
    bad: dict[Cell, PolicyError] = {}
    for cell in cells:
        try:
            check(lm, cell.method, compressed(cell.asked, length), length, f"{length} tokens at {cell.asked:g}x")
            good.append(cell)
        except PolicyError as error:
            bad[cell] = error
    for cell, why in bad.items():
        if all(other.method != cell.method for other in good):
            raise why
    return good, [f"{cell.method.label} at {cell.asked:g}x" for cell in bad]

"""Does ReST-KV's smoothing pay? ReST-KV, ReST-KV without each of its parts, and its rivals, from mild to extreme compression,
on perplexity and on classification.

Perplexity is that of the "prefill" protocol (bench/quality/perplexity.py), classification that of bench/quality/choice.py. No
method evicts after the prompt, so that what is compared is what they keep of it, and so that all of them share its prefill. Under
each probe the first of its methods is compared with the others.
Without data of the user's the texts are generated prose (bench/quality/prose.py), and the classification is between values told
in a context.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.quality.anli import anli_items
from bench.quality.choice import CHOICE, choice_batches, shortest, told_items
from bench.quality.corpus import Document, prose
from bench.quality.perplexity import READ, Protocol, reading_batches, texts_digest
from bench.report.likelihood import smoothing_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import digest
from bench.runs.methods import Method, check, parse_methods
from bench.runs.plans import Cell, at_least, cells_of, check_compression, compressed, modes_of
from bench.runs.run import Work
from restkv.errors import PolicyError, RestKVWarning
from restkv.lm import LM
from restkv.policies import policy_class
from restkv.probes import WINDOW, parse_probe

SUBJECT = "restkv@paper"
# What the paper's ReST-KV is without its parts: temporal smoothing, spatial smoothing, both, the output term, the output
# projection; its other order of averaging; one budget for the whole model, and that without the EMA, which is our default.
# Then its rivals, without any output term.
ARMS = (
    f"{SUBJECT},{SUBJECT}:alpha=none,{SUBJECT}:pooling=none,{SUBJECT}:alpha=none:pooling=none,{SUBJECT}:tau=0,"
    f"{SUBJECT}:output_weight=False,{SUBJECT}:aggregate=indicator,{SUBJECT}:budget_by=global,restkv,"
    "snapkv,h2o,tova,streamingllm,lacache"
)


# What is also run under other probes than the window: ReST-KV, without its smoothings, without the output term; attention alone.
PROBED = frozenset(
    (
        SUBJECT,
        f"{SUBJECT}:alpha=none",
        f"{SUBJECT}:pooling=none",
        f"{SUBJECT}:alpha=none:pooling=none",
        f"{SUBJECT}:tau=0",
        "snapkv",
    )
)


def arms(text: str | None, probes: Sequence[str]) -> tuple[Method, ...]:
    """The full cache, then the arms under every probe; what takes no probe, or says its own, once.

    Args:
        text: methods, which all are run under every probe; None: ARMS, of which few are under others than the window.
    Raises:
        PolicyError: an unknown method or probe.
    """
    labels = []
    for probe in probes:
        parse_probe(probe)
        for method in parse_methods(ARMS if text is None else text)[1:]:
            cls = policy_class(method.name)
            fixed = not cls.observes or "probe" in {**cls.PRESETS.get(method.preset or "", {}), **method.options}
            if fixed or probe == WINDOW:
                labels.append(method.label)
            elif text is not None or method.label in PROBED:
                labels.append(f"{method.label}:probe={probe}")
    return tuple(parse_methods(",".join(labels)))


def by_probe(methods: Sequence[Method], entries: int) -> dict[str, list[str]]:
    """The labels of what is compared under each probe: methods that observe its queries, and after them those that choose none;
    under the first probe in the order in which they were given."""
    policies = {method.label: method.policy(entries) for method in methods if not method.full}
    chooses = {label: policy.probe for label, policy in policies.items() if policy.observes}
    blind = [label for label in policies if label not in chooses]
    found = {probe: [*(one for one, its in chooses.items() if its == probe), *blind] for probe in chooses.values()}
    for probe in list(found)[:1]:
        found[probe] = [label for label in policies if label in found[probe]]
    return found or ({WINDOW: blind} if blind else {})


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
    kind: ClassVar[str] = "smoothing"

    def work(self, lm: LM) -> Work:
        """Windows of text first, then questions. See bench.runs.run.Plan.

        A compression that leaves a method fewer entries than it can work with is left out, and said to be (RestKVWarning); a
        method that can work with none of them is refused.
        """
        at_least(self, length=2, tail=2, windows=1, samples=1)
        check_compression(self.compression, self.length)
        modes, protocol = modes_of(self.question), Protocol("prefill", self.tail, self.length)
        documents = self.documents or (prose(lm.tokenizer, self.windows * (self.length + self.tail), self.seed),)
        windows = protocol.windows(lm, documents, self.windows)
        if self.anli is None:
            items = told_items(lm.tokenizer, self.length, self.samples, self.seed)
        else:
            items = anli_items(self.anli, shots=self.shots, limit=self.samples, seed=self.seed)
        cells = cells_of(self.methods, self.compression)
        reading, left_out = _workable(lm, cells, self.length)
        choosing, also_out = _workable(lm, cells, shortest(lm, items, modes))
        for what, out in (("perplexity", left_out), ("classification", also_out)):
            if out:
                warnings.warn(f"{what}: too few entries, left out: {', '.join(out)}", RestKVWarning, stacklevel=2)
        arguments = {
            "compression": list(self.compression),
            "text": "generated prose" if self.documents is None else texts_digest(documents),
            "length": self.length,
            "tail": self.tail,
            "windows": len(windows),
            "tasks": list(dict.fromkeys(item.task for item in items)),
            "questions": "generated" if self.anli is None else digest(repr(items)),
            "shots": 0 if self.anli is None else self.shots,
            "samples": self.samples,
            "question": self.question,
            "arms": by_probe(self.methods, compressed(min(self.compression), self.length)),
            "seed": self.seed,
            "left out": [*left_out, *(f"{cell} (classification)" for cell in also_out if cell not in left_out)],
        }
        batches = reading_batches(lm, windows, protocol, reading, compressed)
        batches += choice_batches(lm, items, modes, choosing, compressed, once=True)
        return Work(arguments, self.methods, compressed(min(self.compression), self.length), batches)


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


ARGUMENTS: must.Fields = {
    "compression": must.many(must.number(1), 1),
    "tasks": must.many(must.name),
    "arms": must.Absent(must.mapping(must.many(must.name, 1))),
}
ROWS = {"perplexity": READ, "choice": CHOICE}
register(Benchmark("smoothing", "Does smoothing pay?", smoothing_parts, ROWS, ARGUMENTS))

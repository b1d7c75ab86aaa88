"""Perplexity of texts under compression, in three protocols (docs/sources.md §4.6):

    streaming   one token at a time from an empty cache, evicting after each (StreamingLLM, LaCache)
    prefill     a context is prefilled and evicted, and the tokens after it are scored on a cache that grows
    chunked     from an empty cache in chunks, evicting after each; a chunk attends to itself before that

Texts are cut into windows (bench/quality/corpus.py), each read from its beginning. A row has the sum of negative
log-likelihoods of a window's scored tokens, and how many tokens, words and bytes they are: perplexity per any of them is
exp(sum / count).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quality.corpus import Document, Window, cut_windows
from bench.quality.teacher_forcing import PIECE, tail_logprobs
from bench.runs.folder import Report, Run, describe, digest, open_run, setting, versions_text
from bench.runs.methods import Method, check
from bench.runs.plans import Asked, Cell, Entries, cells_of, policy_of, share
from restkv.errors import PromptError
from restkv.generate import Session
from restkv.lm import LM
from restkv.policies import Policy

PROTOCOLS = ("streaming", "prefill", "chunked")
BATCH = 8  # windows read side by side, as rows of one session


@dataclass(frozen=True)
class Protocol:
    """How a window is read.

    Attributes:
        name: one of PROTOCOLS.
        tokens: scored per window.
        context: tokens prefilled before them ("prefill").
        chunk: tokens between two evictions ("chunked").
    """

    name: str
    tokens: int
    context: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise PromptError(f"protocol {self.name!r} is not known; choose from {', '.join(PROTOCOLS)}")
        needed = {"tokens": 2, **{"prefill": {"context": 2}, "chunked": {"chunk": 1}}.get(self.name, {})}
        for name, least in needed.items():
            if getattr(self, name) < least:
                raise PromptError(f"{name} {getattr(self, name)}: give at least {least}")

    @property
    def read(self) -> int:
        """What fractional budgets are fractions of: the context, or without one all tokens."""
        return self.context if self.name == "prefill" else self.tokens

    def windows(self, lm: LM, documents: Sequence[Document], count: int) -> list[Window]:
        """See cut_windows; all token ids are in the model's vocabulary."""
        context = self.context if self.name == "prefill" else 0
        windows = cut_windows(lm.tokenizer, documents, context, self.tokens, count)
        for window in windows:
            lm.encode(window.ids)
        return windows


@dataclass(frozen=True)
class PerplexityPlan:
    """The arguments of a run.

    Attributes:
        budgets: entries per KV head, or fractions of what is read (Protocol.read).
        windows: how many, at most.
    """

    documents: tuple[Document, ...]
    methods: tuple[Method, ...]
    budgets: tuple[Asked, ...]
    protocol: Protocol
    windows: int = 16

    def arguments(self, lm: LM) -> dict[str, Any]:
        """JSON-ready; the texts are in it as a hash."""
        return {
            "text": texts_digest(self.documents),
            "methods": [method.label for method in self.methods],
            "budgets": list(self.budgets),
            "protocol": self.protocol.name,
            **{name: getattr(self.protocol, name) for name in ("tokens", "context", "chunk")},
            "windows": self.windows,
            **setting(lm),
        }


def texts_digest(documents: Sequence[Document]) -> str:
    """A name for exactly these texts."""
    return digest("\0".join(document.text for document in documents))


def run_perplexity(lm: LM, plan: PerplexityPlan, folder: Path, report: Report | None = None) -> Path:
    """Run the plan, or what is missing of it, into a folder (bench/runs/folder.py).

    Raises:
        PromptError: texts that are too short, a plan without sense. PolicyError: a method that cannot work with one of the
        budgets. RunError: see open_run.
    """
    if plan.windows < 1:
        raise PromptError(f"windows {plan.windows}: give at least 1")
    protocol, cells = plan.protocol, cells_of(plan.methods, plan.budgets)
    for cell in cells:
        what = f"budget {cell.asked:g} of {protocol.read} tokens"
        check(lm, cell.method, share(cell.asked, protocol.read), protocol.read, what)
    windows = protocol.windows(lm, plan.documents, plan.windows)
    arguments = {**plan.arguments(lm), "results": len(windows) * len(cells)}
    details = describe(lm, plan.methods, max(share(asked, protocol.read) for asked in plan.budgets))
    with open_run(folder, "perplexity", arguments, details, arguments["results"], report) as results:
        fill_perplexity(lm, windows, protocol, cells, share, results)
    return folder


def fill_perplexity(
    lm: LM,
    windows: Sequence[Window],
    protocol: Protocol,
    cells: Sequence[Cell],
    entries: Entries,
    results: Run,
) -> None:
    """A row per window and cell: window by window, or (streaming, chunked) a few windows at a time, cell by cell."""
    numbered = list(enumerate(windows))
    if protocol.name == "prefill":
        for number, window in numbered:
            keys = [_key(protocol, number, cell) for cell in cells]
            results.add_together(keys, partial(_after_prefill, lm, number, window, protocol, cells, entries))
        return
    for start in range(0, len(windows), BATCH):
        some = numbered[start : start + BATCH]
        for cell in cells:
            keys = [_key(protocol, number, cell) for number, _ in some]
            results.add_together(keys, partial(_from_nothing, lm, some, protocol, cell, entries))


def _key(protocol: Protocol, number: int, cell: Cell) -> str:
    return f"perplexity/{protocol.name}/{number}/{cell.key}"


def _row(number: int, window: Window, protocol: Protocol, about: dict[str, Any], said_T: Tensor) -> dict[str, Any]:
    return {
        "part": "perplexity",
        "protocol": protocol.name,
        "window": number,
        "document": window.document,
        "start": window.start,
        "prompt": digest(repr(window.ids)),
        **about,
        "tokens": len(said_T),
        "words": window.words,
        "text_bytes": window.bytes,
        "nll": round(-float(said_T.double().sum()), 6),
        "versions": versions_text(),
    }


def _after_prefill(
    lm: LM, number: int, window: Window, protocol: Protocol, cells: Sequence[Cell], entries: Entries
) -> list[dict[str, Any]]:
    """One window under all cells, which share its prefill."""
    counts = [entries(cell.asked, window.first) for cell in cells]
    policies = [policy_of(lm, cell, count, window.prompt, once=True) for cell, count in zip(cells, counts, strict=True)]
    rows = []
    told = tail_logprobs(lm, policies, window.prompt, window.scored)
    for cell, count, policy, (held, said_T) in zip(cells, counts, policies, told, strict=True):
        rows.append(_row(number, window, protocol, {**cell.about(count, policy), **held.about()}, said_T))
    return rows


@torch.no_grad()
def _from_nothing(
    lm: LM, some: Sequence[tuple[int, Window]], protocol: Protocol, cell: Cell, entries: Entries
) -> list[dict[str, Any]]:
    """A few windows under one cell, as rows of one session that begins with an empty cache."""
    windows = [window for _, window in some]
    count = entries(cell.asked, protocol.read)
    policy = policy_of(lm, cell, count, windows[0].ids, once=False)
    session, said_BT = read(lm, policy, protocol, [window.prompt for window in windows], [w.scored for w in windows])
    kept_BN = list(zip(*session.kept(), strict=True))
    rows = []
    for (number, window), kept, said_T in zip(some, kept_BN, said_BT, strict=True):
        about = {**cell.about(count, session.policy), "kept": round(sum(kept) / len(kept), 3)}
        rows.append(_row(number, window, protocol, about, said_T))
    session.cache.free()
    return rows


@torch.no_grad()
def read(
    lm: LM, policy: Policy, protocol: Protocol, begun: Sequence[list[int]], scored: Sequence[list[int]]
) -> tuple[Session, list[Tensor]]:
    """Read rows by the streaming or the chunked protocol.

    Args:
        begun: the tokens that stand before the scored ones.
        scored: token ids, as many in every row.
    Returns:
        The session after the last token, and the log-probability (nats) of each scored token, [T] for every row.
    """
    full, lengths, later = policy.budget is None, [len(ids) for ids in begun], len(scored[0])
    chunk = PIECE if full or protocol.name == "streaming" else protocol.chunk
    if not full:
        policy = replace(policy, interval=1)  # after every token, or after every chunk
    by_chunks = full or protocol.name == "chunked"  # what evicts nothing may be read in chunks: it makes no difference
    session = Session(lm.engine, policy, lengths, later, chunk=chunk, extends=by_chunks)
    session.prefill(begun)
    if by_chunks:
        return session, session.logprobs(scored)
    ids_BT = torch.tensor(scored, device=lm.device)
    said = []
    for t in range(later):
        said.append(session.logits_BV.log_softmax(-1).gather(1, ids_BT[:, t : t + 1]))
        session.feed(ids_BT[:, t])
    return session, list(torch.cat(said, 1))

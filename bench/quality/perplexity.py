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
from typing import ClassVar

import torch
from torch import Tensor

from bench.quality.corpus import Document, Window, cut_windows
from bench.quality.teacher_forcing import PIECE, logprobs, tail_logprobs
from bench.report.likelihood import perplexity_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import digest
from bench.runs.methods import Method, check
from bench.runs.plans import Asked, Cell, Entries, at_least, cells_of, policy_of, share
from bench.runs.rows import Row
from bench.runs.run import Batch, Work
from bench.runs.together import Held
from restkv.errors import PromptError
from restkv.lm import LM
from restkv.policies import Policy
from restkv.session import Session

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
        at_least(self, tokens=2, **{"prefill": {"context": 2}, "chunked": {"chunk": 1}}.get(self.name, {}))

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
    kind: ClassVar[str] = "perplexity"

    def work(self, lm: LM) -> Work:
        """See bench.runs.run.Plan; the texts are in the arguments as a hash."""
        at_least(self, windows=1)
        protocol, cells = self.protocol, cells_of(self.methods, self.budgets)
        for cell in cells:
            what = f"budget {cell.asked:g} of {protocol.read} tokens"
            check(lm, cell.method, share(cell.asked, protocol.read), protocol.read, what)
        arguments = {
            "text": texts_digest(self.documents),
            "budgets": list(self.budgets),
            "protocol": protocol.name,
            **{name: getattr(protocol, name) for name in ("tokens", "context", "chunk")},
            "windows": self.windows,
        }
        windows = protocol.windows(lm, self.documents, self.windows)
        most = max(share(asked, protocol.read) for asked in self.budgets)
        return Work(arguments, self.methods, most, reading_batches(lm, windows, protocol, cells, share))


def texts_digest(documents: Sequence[Document]) -> str:
    """A name for exactly these texts."""
    return digest("\0".join(document.text for document in documents))


def reading_batches(
    lm: LM, windows: Sequence[Window], protocol: Protocol, cells: Sequence[Cell], entries: Entries
) -> list[Batch]:
    """Of a row per window and cell: window by window, or (streaming, chunked) a few windows at a time, cell by cell."""

    def key(number: int, cell: Cell) -> str:
        return f"perplexity/{protocol.name}/{number}/{cell.key}"

    batches = []
    if protocol.name == "prefill":
        for number, window in enumerate(windows):
            measure = partial(_after_prefill, lm, number, window, protocol, cells, entries)
            batches.append(Batch([key(number, cell) for cell in cells], measure))
        return batches
    numbered = list(enumerate(windows))
    for start in range(0, len(windows), BATCH):
        some = numbered[start : start + BATCH]
        for cell in cells:
            measure = partial(_from_nothing, lm, some, protocol, cell, entries)
            batches.append(Batch([key(number, cell) for number, _ in some], measure))
    return batches


def _row(
    at: int, window: Window, protocol: Protocol, cell: Cell, entries: int, policy: Policy, held: Held, said_T: Tensor
) -> Row:
    place = {"window": at, "document": window.document, "start": window.start}
    counts = {"tokens": len(said_T), "words": window.words, "text_bytes": window.bytes}
    measures = {"prompt": digest(repr(window.ids)), **counts, "nll": round(-float(said_T.double().sum()), 6)}
    about = {"part": "perplexity", "protocol": protocol.name, **place}
    return cell.row(entries, policy, held, about, measures)


def _after_prefill(
    lm: LM, number: int, window: Window, protocol: Protocol, cells: Sequence[Cell], entries: Entries
) -> list[Row]:
    """One window under all cells, which share its prefill."""
    counts = [entries(cell.asked, window.first) for cell in cells]
    policies = [policy_of(lm, cell, count, window.prompt, once=True) for cell, count in zip(cells, counts, strict=True)]
    told = tail_logprobs(lm, policies, window.prompt, window.scored)
    return [
        _row(number, window, protocol, cell, count, policy, held, said_T)
        for cell, count, policy, (held, said_T) in zip(cells, counts, policies, told, strict=True)
    ]


@torch.no_grad()
def _from_nothing(
    lm: LM, some: Sequence[tuple[int, Window]], protocol: Protocol, cell: Cell, entries: Entries
) -> list[Row]:
    """A few windows under one cell, as rows of one session that begins with an empty cache."""
    windows = [window for _, window in some]
    count = entries(cell.asked, protocol.read)
    policy = policy_of(lm, cell, count, windows[0].ids, once=False)
    session, said_BT = read(lm, policy, protocol, [window.prompt for window in windows], [w.scored for w in windows])
    kept_BN = list(zip(*session.kept(), strict=True))
    rows = []
    for (number, window), kept, said_T in zip(some, kept_BN, said_BT, strict=True):
        held = Held(sum(kept) / len(kept), None)
        rows.append(_row(number, window, protocol, cell, count, session.policy, held, said_T))
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
        return session, logprobs(session, scored)
    ids_BT = torch.tensor(scored, device=lm.device)
    said = []
    for t in range(later):
        said.append(session.logits_BV.log_softmax(-1).gather(1, ids_BT[:, t : t + 1]))
        session.feed(ids_BT[:, t])
    return session, list(torch.cat(said, 1))


READ: must.Fields = {  # what a row of these must hold
    "window": must.whole(),
    "nll": must.number(),
    "tokens": must.whole(1),
    "words": must.whole(),
    "text_bytes": must.whole(),
}
ARGUMENTS: must.Fields = {
    "protocol": must.one_of(*PROTOCOLS),
    **{name: must.whole() for name in ("tokens", "context", "chunk")},
}
register(Benchmark("perplexity", "Perplexity", perplexity_parts, READ, ARGUMENTS))

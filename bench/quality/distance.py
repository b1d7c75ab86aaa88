"""How far what a cache expects of a text is from what the full cache expects, token by token, with the text itself as teacher.

    kl      KL(full || method), nats per token
    top1    share of tokens whose most likely successor is the same
    nll     negative log-likelihood of the true next token, nats

A text is fed to all rows of a session at once: in pieces, where nothing is evicted meanwhile, otherwise token by token.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.quality.teacher_forcing import PIECE
from restkv.session import Session


class Reader(Protocol):
    """What is shown of an answer that a row is fed."""

    def see(self, at: int, log_TV: Tensor) -> None:
        """Take in what was expected before the answer's tokens from number `at` on: log-probabilities [T, V], float64."""


@dataclass
class Told:
    """What the full cache expects before each token of an answer.

    Attributes:
        letters: token ids of which one is to be chosen as the answer's first.
    """

    answer_T: Tensor
    letters: tuple[int, ...] = ()
    pieces: list[Tensor] = field(default_factory=list)

    def see(self, at: int, log_TV: Tensor) -> None:
        self.pieces.append(log_TV)

    @cached_property
    def log_TV(self) -> Tensor:
        return torch.cat(self.pieces)

    @cached_property
    def share_TV(self) -> Tensor:
        """The probabilities themselves; every method asks for them."""
        return self.log_TV.exp()

    @cached_property
    def nats(self) -> float:
        return -_likelihood(self.log_TV, self.answer_T)


@dataclass
class Judged:
    """Sums over the tokens of an answer of how far a method is from the full cache."""

    full: Told
    kl: float = 0.0
    same: float = 0.0
    nats: float = 0.0
    letters: tuple[float, ...] = ()

    def see(self, at: int, log_TV: Tensor) -> None:
        full = self.full
        full_TV, share_TV, answer_T = (of[at : at + len(log_TV)] for of in (full.log_TV, full.share_TV, full.answer_T))
        apart_TV = share_TV * (full_TV - log_TV)
        self.kl += float(apart_TV.where(full_TV > -torch.inf, 0.0).sum())  # a padded vocabulary has logits of -inf
        self.same += float((log_TV.argmax(-1) == full_TV.argmax(-1)).sum())
        self.nats -= _likelihood(log_TV, answer_T)
        if at == 0:
            self.letters = tuple(log_TV[0, list(full.letters)].tolist())

    def measures(self) -> dict[str, Any]:
        """As a row has them: means over the answer's tokens."""
        count = len(self.full.answer_T)
        sums = {"kl": self.kl, "top1": self.same, "nll": self.nats, "full_nll": self.full.nats}
        return {name: value / count for name, value in sums.items()}


def _likelihood(log_TV: Tensor, ids_T: Tensor) -> float:
    return float(log_TV.gather(1, ids_T[:, None]).sum())


def force(session: Session, tail: Sequence[int], answer: Sequence[int], readers: Sequence[Reader]) -> None:
    """`read` of a fork: the session stays as it is."""
    fork = session.fork(len(tail) + len(answer))
    try:
        read(fork, tail, answer, readers)
    finally:
        fork.cache.free()


def read(session: Session, tail: Sequence[int], answer: Sequence[int], readers: Sequence[Reader]) -> None:
    """Feed a tail and all but the last token of an answer to all rows, and show every row's reader what is expected before each
    of the answer's tokens.

    In pieces, where nothing is evicted meanwhile; otherwise the tail as CompressedContext.ask reads a question, and the answer
    token by token.
    """
    rows, ids, schedule = len(session.active), [*tail, *answer], session.schedule

    def show(row: int, at: int, logits_TV: Tensor) -> None:
        log_TV = logits_TV.double().log_softmax(-1)
        if log_TV.isnan().any():  # sync: once per piece of an answer
            raise session.numeric_error(row)
        readers[row].see(at, log_TV)

    if schedule.interval and schedule.since_eviction + len(ids) - 1 >= schedule.interval:
        session.extend([tail] * rows)
        for at, token in enumerate(answer):
            for row in range(rows):
                show(row, at, session.logits_BV[row][None])
            if at + 1 < len(answer):
                session.feed(torch.tensor([token] * rows, device=session.engine.device))
        return
    for start in range(0, len(ids) - 1, PIECE):

        def judge(row: int, before_TV: Tensor, at: int = start - len(tail)) -> None:
            if at + len(before_TV) > 0:
                show(row, max(at, 0), before_TV[max(-at, 0) :])

        session.expect([ids[start : min(start + PIECE, len(ids) - 1)]] * rows, judge)
    for row in range(rows):  # before the last token, which nothing follows
        show(row, len(answer) - 1, session.logits_BV[row][None])

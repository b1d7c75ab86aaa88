"""Teacher forcing: how likely given texts are on a cache that has been evicted.

Texts are fed to forks of a session, token by token and all rows side by side, with whatever eviction the policy has while
decoding (LM.score is the same for one row at a time); or, where nothing is evicted after the prompt, piece by piece. The rows are
many contexts under one policy (score_rows), or one prompt under many policies (score_choices, tail_logprobs), which share its
prefill (bench/runs/together.py).

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.runs.together import Held, under_each
from restkv.lm import LM
from restkv.policies import Policy
from restkv.prefill import dense_hidden
from restkv.session import Session

PIECE = 64  # tokens read at once by all rows of a session: their attention and logits must fit into memory
Ids = Sequence[int]


@dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
        logprob: sum over its tokens, nats.
        greedy: every token of it was the likeliest one.
    """

    logprob: float
    greedy: bool


@dataclass
class Tally:
    """What the caches of some requests held when they were done, summed over requests.

    Attributes:
        requests: how many.
        seen: entries per KV head that full caches would hold.
        kept: entries per KV head (mean over layers and heads) that were held.
        evictions: times that rows were cut back while tokens were fed.
    """

    requests: int = 0
    seen: int = 0
    kept: float = 0.0
    evictions: int = 0

    def add(self, seen: Sequence[int], kept: Sequence[Sequence[float]], evictions: int) -> None:
        """Count some rows, as a session or its Stats describe them: `seen` of each row, `kept` of each layer and row."""
        self.requests += len(seen)
        self.seen += sum(seen)
        self.kept += sum(map(sum, kept)) / len(kept)
        self.evictions += evictions


@torch.no_grad()
def score_rows(
    lm: LM,
    policy: Policy,
    contexts: Sequence[Ids],
    continuations: Sequence[Sequence[Ids]],
    prefill: str = "dense",
    tally: Tally | None = None,
) -> list[list[Score]]:
    """Prefill and evict every context, then score each of its continuations on the cache that is left.

    Args:
        contexts: token ids, at least one each; the rows of one session.
        continuations: see score_forks.
        prefill: "dense" or "chunked", see Session.
        tally: counts every row after the longest of its continuations.
    Returns:
        one list per row, in the order of its continuations.
    """
    longest = max(len(ids) for row in continuations for ids in row)
    session = Session(lm.engine, policy, [*map(len, contexts)], longest, prefill=prefill, forks=int(longest > 1))
    session.prefill(contexts)
    return score_forks(session, continuations, tally)


@torch.no_grad()
def score_choices(
    lm: LM, policies: Sequence[Policy], prompt: Ids, question: Ids, choices: Sequence[Ids]
) -> list[tuple[Held, list[float]]]:
    """How likely each choice is under each policy.

    Args:
        prompt: token ids that are prefilled and evicted.
        question: token ids appended to what is left; without any, the first token of a choice is judged by the dense prefill.
        choices: token ids that may go on from there.
    Returns:
        For each policy what it kept of the prompt, and the log-probability of every choice (nats).
    """

    def likely(session: Session) -> list[list[float]]:
        rows = len(session.active)
        if question:
            session.extend([question] * rows)
        return [[score.logprob for score in scores] for scores in score_forks(session, [choices] * rows)]

    later = len(question) + max(map(len, choices))
    return under_each(lm, policies, prompt, later, likely, extends=bool(question))


@torch.no_grad()
def tail_logprobs(lm: LM, policies: Sequence[Policy], prompt: Ids, tail: Ids) -> list[tuple[Held, Tensor]]:
    """How likely the tokens of a tail are under each policy, read piece by piece on a growing cache.

    Returns:
        For each policy what it kept of the prompt, and the tail's log-probabilities [T] (nats).
    """

    def likely(session: Session) -> list[Tensor]:
        rows = len(session.active)
        pieces = [logprobs(session, [tail[at : at + PIECE]] * rows) for at in range(0, len(tail), PIECE)]
        return [torch.cat(row) for row in zip(*pieces, strict=True)]

    return under_each(lm, policies, prompt, len(tail), likely, extends=True)


@torch.no_grad()
def logprobs(session: Session, rows: Sequence[Ids]) -> list[Tensor]:
    """Append tokens to a session, and say how likely each was: log-probabilities (nats), float32, [T] for every row.

    Raises:
        NumericError: a token was judged by logits that are no numbers.
    """
    said = [session.logits_BV.new_empty(0)] * len(rows)

    def judge(row: int, before_TV: Tensor) -> None:
        at = len(said[row])
        target_T1 = torch.tensor(rows[row][at : at + len(before_TV)], device=before_TV.device)[:, None]
        said[row] = torch.cat([said[row], before_TV.log_softmax(-1).gather(1, target_T1)[:, 0]])

    session.expect(rows, judge)
    for row, said_T in enumerate(said):
        if said_T.isnan().any():  # sync: once per call
            raise session.numeric_error(row)
    return said


@torch.no_grad()
def score_forks(
    session: Session, continuations: Sequence[Sequence[Ids]], tally: Tally | None = None
) -> list[list[Score]]:
    """Score every row's continuations, each on a fork; the session stays as it is.

    Args:
        continuations: of every row, token ids, at least one each.
        tally: counts every row after the longest of its continuations.
    """
    if tally is None and all(len(ids) == 1 for row in continuations for ids in row):
        return _score_next(session, [[token for (token,) in row] for row in continuations])
    scores: list[dict[int, Score]] = [{} for _ in continuations]
    # The longest first, so that rows share their steps.
    orders = [sorted(range(len(row)), key=lambda index, row=row: -len(row[index])) for row in continuations]  # type: ignore[misc]
    for wave in range(max(map(len, orders))):
        some = [order[wave] if wave < len(order) else None for order in orders]
        targets = [() if index is None else row[index] for index, row in zip(some, continuations, strict=True)]
        fork = session.fork(max(map(len, targets)))
        for row, (index, score) in enumerate(zip(some, _force(fork, targets), strict=True)):
            if index is not None:
                scores[row][index] = score
        if tally is not None and wave == 0:
            tally.add(fork.cache.next_pos.tolist(), fork.kept(), fork.evictor.evictions)
        fork.cache.free()
    return [[row[index] for index in range(len(row))] for row in scores]


def _score_next(session: Session, tokens: Sequence[Ids]) -> list[list[Score]]:
    """Score every row's tokens as the next one: nothing has to be fed for that."""
    scores = []
    for logp_V, row in zip(session.logits_BV.log_softmax(-1), tokens, strict=False):
        likeliest = int(logp_V.argmax())
        scores.append(
            [Score(value, token == likeliest) for token, value in zip(row, logp_V[list(row)].tolist(), strict=True)]
        )
    return scores


def _force(session: Session, targets: Sequence[Ids]) -> list[Score]:
    """Feed every row its target (nothing for an empty one) and see how likely each token was."""
    device, longest = session.logits_BV.device, max(map(len, targets))
    sum_B = torch.zeros(len(targets), dtype=torch.float64, device=device)
    greedy_B = torch.ones(len(targets), dtype=torch.bool, device=device)
    for at in range(longest):
        for row, target in enumerate(targets):
            if at == max(len(target) - 1, 0):
                session.finish(row)  # the last token is only looked up
        ids_B = torch.tensor([target[at] if at < len(target) else -1 for target in targets], device=device)
        goes_B = ids_B >= 0
        ids_B = ids_B.clamp(min=0)
        logp_BV = session.logits_BV.log_softmax(-1)
        sum_B += logp_BV.gather(-1, ids_B[:, None])[:, 0].where(goes_B, 0.0)
        greedy_B &= (logp_BV.argmax(-1) == ids_B) | ~goes_B
        if at + 1 < longest:
            session.feed(ids_B)
    return [Score(*pair) for pair in zip(sum_B.tolist(), greedy_B.tolist(), strict=True)]


@torch.no_grad()
def score_unevicted(lm: LM, context: Ids, continuation: Ids) -> Score:
    """What score_rows gives with the full cache, in one pass over context and continuation."""
    x_LE = dense_hidden(lm.model, [*context, *continuation[:-1]])
    logp_LV = lm.model.head(x_LE[len(context) - 1 :]).log_softmax(-1)
    ids_L = torch.tensor(continuation, device=lm.device)
    total = logp_LV.gather(-1, ids_L[:, None]).double().sum()
    return Score(float(total), bool((logp_LV.argmax(-1) == ids_L).all()))

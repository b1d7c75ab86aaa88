"""Teacher forcing in batches: how likely texts are after contexts that were prefilled and evicted.

A context is a row of one session and is prefilled once; each of its continuations is fed token by token to a fork of it, all rows
side by side, with whatever eviction the policy has while decoding. LM.logprobs is the same for one row at a time.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from restkv.generate import Session
from restkv.lm import LM
from restkv.policies import Policy
from restkv.prefill import dense_hidden


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
class Kept:
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

    def add(self, session: Session) -> None:
        """Count the rows of a session."""
        layers = session.kept()
        self.requests += len(layers[0])
        self.seen += int(session.cache.next_pos.sum())
        self.kept += sum(map(sum, layers)) / len(layers)
        self.evictions += session.evictions


@torch.no_grad()
def score_rows(
    lm: LM,
    policy: Policy,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    prefill: str = "dense",
    kept: Kept | None = None,
) -> list[list[Score]]:
    """Prefill and evict every context, then score each of its continuations on the cache that is left.

    Args:
        contexts: token ids, at least one each; the rows of one session.
        continuations: of every row, token ids, at least one each.
        prefill: "dense" or "chunked", see Session.
        kept: counts every row after the longest of its continuations.
    Returns:
        one list per row, in the order of its continuations.
    Raises:
        PolicyError: the protected entries of a row do not fit into its budget.
    """
    longest = max(len(ids) for row in continuations for ids in row)
    session = Session(lm.engine, policy, [*map(len, contexts)], longest, prefill=prefill, forks=int(longest > 1))
    session.prefill(contexts)
    scores: list[dict[int, Score]] = [{} for _ in contexts]
    orders = [_longest_first(row) for row in continuations]  # so that rows share their steps
    for wave in range(max(map(len, orders))):
        some = [order[wave] if wave < len(order) else None for order in orders]
        targets = [() if index is None else row[index] for index, row in zip(some, continuations, strict=True)]
        fork = session.fork(max(map(len, targets)))
        for row, (index, score) in enumerate(zip(some, _force(fork, targets), strict=True)):
            if index is not None:
                scores[row][index] = score
        if kept is not None and wave == 0:
            kept.add(fork)
        fork.cache.free()
    return [[row[index] for index in range(len(row))] for row in scores]


def _longest_first(texts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of texts by falling length."""
    return sorted(range(len(texts)), key=lambda index: -len(texts[index]))


def _force(session: Session, targets: Sequence[Sequence[int]]) -> list[Score]:
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
def score_unevicted(lm: LM, context: Sequence[int], continuation: Sequence[int]) -> Score:
    """What score_rows gives with the full cache, in one pass over context and continuation."""
    x_LE = dense_hidden(lm.model, [*context, *continuation[:-1]], lm.device)
    logp_LV = lm.model.head(x_LE[len(context) - 1 :]).log_softmax(-1)
    ids_L = torch.tensor(continuation, device=lm.device)
    total = logp_LV.gather(-1, ids_L[:, None]).double().sum()
    return Score(float(total), bool((logp_LV.argmax(-1) == ids_L).all()))

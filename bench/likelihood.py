"""Teacher forcing under many policies at once: how likely given texts are after a prompt that each policy has evicted.

The prompt is prefilled once for all of them (bench/together.py).

Letters: B rows, each with a policy of its own; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.together import answer_together, prefill_all
from restkv.lm import LM
from restkv.policies import Policy

PIECE = 64  # tokens read at once by all rows of a session: their attention and logits must fit into memory

# -- many policies, one prompt


@torch.no_grad()
def choose_together(
    lm: LM, policies: Sequence[Policy], prompt: Sequence[int], question: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """How likely each choice is under each policy.

    Args:
        prompt: token ids that are prefilled and evicted.
        question: token ids appended to what is left; without any, the first token of a choice is judged by the dense prefill.
        choices: token ids that may go on from there; each on a fork of its own.
    Returns:
        One dict per policy: kept (entries per layer and KV head after the prompt), bytes (theirs), logprobs (one sum of
        log-probabilities per choice, nats).
    """
    later = len(question) + max(map(len, choices))
    groups = answer_together(lm, policies, len(prompt), later, extends=bool(question))
    prefill_all(lm, groups, prompt)
    rows: list[dict[str, Any]] = [{} for _ in policies]
    for group in groups:
        session, count = group.session, len(group.policies)
        held = [{"kept": round(group.kept(row), 3), "bytes": group.live_bytes(row)} for row in range(count)]
        if question:
            session.extend([question] * count)
        sums = []
        for choice in choices:
            fork, total_B = session.fork(len(choice)), torch.zeros(count, dtype=torch.float64, device=lm.device)
            for index, token in enumerate(choice):
                total_B += fork.logits_BV.log_softmax(-1)[:, token]
                if index + 1 < len(choice):
                    fork.feed(torch.full((count,), token, device=lm.device))
            fork.cache.free()
            sums.append(total_B.tolist())
        session.cache.free()
        for index, left, logprobs in zip(group.about, held, zip(*sums, strict=True), strict=True):
            rows[index] = {**left, "logprobs": [round(value, 6) for value in logprobs]}
    return rows


@torch.no_grad()
def tail_together(
    lm: LM, policies: Sequence[Policy], prompt: Sequence[int], tail: Sequence[int]
) -> list[tuple[dict[str, Any], Tensor]]:
    """How likely the tokens of a tail are under each policy, read piece by piece on a growing cache.

    Returns:
        For each policy what it kept (see choose_together), and the tail's log-probabilities [T] (nats).
    """
    groups = answer_together(lm, policies, len(prompt), len(tail), extends=True)
    prefill_all(lm, groups, prompt)
    rows: dict[int, tuple[dict[str, Any], Tensor]] = {}
    for group in groups:
        session, count = group.session, len(group.policies)
        held = [{"kept": round(group.kept(row), 3), "bytes": group.live_bytes(row)} for row in range(count)]
        pieces = [session.logprobs([tail[at : at + PIECE]] * count) for at in range(0, len(tail), PIECE)]
        session.cache.free()
        for row, index in enumerate(group.about):
            rows[index] = held[row], torch.cat([piece[row] for piece in pieces])
    return [rows[index] for index in range(len(policies))]

"""Heads of several ranks that compete for one budget: what crosses so that all come to the same choice (docs/parallel.md).

An allocation that compares heads is given those of all ranks, on every one of them, and each rank keeps what it says of its own:
the outcome is that of one process. Eight bytes cross of every entry: its score, and its position with its protection. Alone,
everything is handed through.

Letters: B batch rows, X heads of this rank with a kept set of their own, n ranks, C entries of one head (columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.ranks import Ranks
from restkv.budgets import LONGEST, Allocation, Global

Ranking = tuple[Tensor, Tensor, Tensor]
"""Score (float), position (int, -1: no entry) and protection (bool) of a layer's entries, [B, X, C] each (Policy.ranking)."""


def select(ranks: Ranks, allocation: Allocation, ranking: Ranking, budget_B: Tensor) -> Tensor:
    """allocation.select among the heads of all ranks: keep [B, X, C] bool of this one's."""
    if not allocation.ragged:  # every head has a budget of its own
        return allocation.select(*ranking, budget_B)
    (whole,) = gathered(ranks, [ranking])
    return ranks.own(allocation.select(*whole, budget_B), 1)[..., : ranking[0].shape[-1]]


def select_layers(ranks: Ranks, allocation: Global, rankings: Sequence[Ranking], budget_B: Tensor) -> list[Tensor]:
    """allocation.select_layers among the heads of all ranks: keep [B, X, C] bool of this one's heads in every layer."""
    score, pos, protected = zip(*gathered(ranks, rankings), strict=True)
    keeps = allocation.select_layers(score, pos, protected, budget_B)
    return [ranks.own(keep_BXC, 1)[..., : own.shape[-1]] for keep_BXC, (own, *_) in zip(keeps, rankings, strict=True)]


def gathered(ranks: Ranks, rankings: Sequence[Ranking], columns: Sequence[int] | None = None) -> list[Ranking]:
    """Every layer's ranking with the heads of all ranks, [B, n X, C']: C' is the most columns that a rank has.

    Args:
        columns: C' of every layer, where all ranks know it; None: it is asked for, which waits for the device.
    """
    if ranks.size == 1:
        return list(rankings)
    columns = columns or ranks.most([score.shape[-1] for score, *_ in rankings])
    padded = [
        tuple(_padded(x, width) for x in (score, pos, protected))
        for (score, pos, protected), width in zip(rankings, columns, strict=True)
    ]
    packed = [_packed(score, pos, protected) for score, pos, protected in padded]
    whole_nm = ranks.gather(torch.cat(packed)[None], 0)
    parts = whole_nm.split([len(one) for one in packed], 1)
    return [_unpacked(part_nm, score) for part_nm, (score, *_) in zip(parts, padded, strict=True)]


def _padded(x_BXC: Tensor, width: int) -> Tensor:
    """With columns that hold no entry: position -1, whatever the score."""
    if x_BXC.shape[-1] == width:
        return x_BXC
    filling = x_BXC.new_full((*x_BXC.shape[:2], width - x_BXC.shape[-1]), -1 if x_BXC.dtype == torch.int64 else 0)
    return torch.cat([x_BXC, filling], -1)


def _packed(score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor) -> Tensor:
    """[m] int32: the bits of the scores, then the positions, to which protection adds LONGEST, which no position reaches."""
    exists_BXC = pos_BXC >= 0
    place_BXC = torch.where(exists_BXC, pos_BXC + LONGEST * protected_BXC, -1).int()
    return torch.cat([score_BXC.contiguous().view(torch.int32).flatten(), place_BXC.flatten()])


def _unpacked(part_nm: Tensor, like_BXC: Tensor) -> Ranking:
    """What _packed made of each rank's heads; `like_BXC`: one rank's scores."""
    B, X, C = like_BXC.shape
    bits_nm, place_nm = part_nm.split([part_nm.shape[1] - B * X * C, B * X * C], 1)

    def heads(x_nm: Tensor) -> Tensor:
        return x_nm.reshape(-1, B, X, C).transpose(0, 1).flatten(1, 2)

    place_BXC = heads(place_nm)
    protected_BXC = place_BXC >= LONGEST
    score_BXC = heads(bits_nm.contiguous().view(like_BXC.dtype))
    return score_BXC, (place_BXC - LONGEST * protected_BXC).long(), protected_BXC

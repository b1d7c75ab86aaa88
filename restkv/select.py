"""From scores to the entries that stay.

Letters: B batch rows, C entries of one head (columns), X KV heads or query heads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECES = 4  # per thread: what one works on stays in its cache
THREADED = 1 << 20  # numbers from which on threads of numpy's are worth starting


def select(score_BXC: Tensor, pos_BXC: Tensor, protected_BXC: Tensor, budget: int | Tensor) -> Tensor:
    """Keep the `budget` best entries of every head.

    Protected entries come first, then the highest scores; NaN counts as -inf; of equal scores the older position loses.
    Neither the order of the columns nor the device changes the outcome, and nothing waits for the device.

    Args:
        score_BXC: float, higher stays.
        pos_BXC: int, position of each entry, unique within a head; -1 = no entry, never kept.
        protected_BXC: bool, kept whatever the score, even where they outnumber the budget.
        budget: entries to keep per head: an int, [B] or [B, X].

    Returns:
        keep [B, X, C] bool with exactly min(entries, max(budget, protected entries)) True per head.
    """
    exists_BXC = pos_BXC >= 0
    protected_BXC = protected_BXC & exists_BXC
    budget_BX = torch.as_tensor(budget, device=pos_BXC.device)
    if budget_BX.ndim == 1:
        budget_BX = budget_BX[:, None]
    most = budget if isinstance(budget, int) else None
    others_BXC = exists_BXC & ~protected_BXC
    return protected_BXC | top(score_BXC, pos_BXC, others_BXC, budget_BX - protected_BXC.sum(-1), most)


def top(score_XC: Tensor, pos_XC: Tensor, among_XC: Tensor, count_X: Tensor, most: int | None = None) -> Tensor:
    """The `count_X` best entries of every line (all of them where there are fewer, none where the count is negative).

    NaN counts as -inf; of equal scores the older position loses, of equal positions the later column. Two cuts find
    them, at the lowest score and at the oldest of the entries that share it, since topk alone breaks ties as it likes;
    that is several times faster than stable sorts.

    Args:
        score_XC, pos_XC: one line of entries each; any number of leading dimensions.
        among_XC: bool, the entries to choose from; their positions are at least 0.
        count_X: int, entries to take of each line.
        most: no count is larger, if the host knows such a number: saves time.

    Returns:
        bool, the shape of `among_XC`.
    """
    columns = pos_XC.shape[-1]
    most = columns if most is None else min(max(most, 1), columns)
    count_X1 = torch.minimum(count_X, among_XC.sum(-1)).clamp(0)[..., None]
    if not columns:
        return among_XC
    score_XC = score_XC.masked_fill(~among_XC | score_XC.isnan(), -torch.inf)
    lowest_X1 = _nth_largest(score_XC, count_X1, most)
    above_XC = score_XC > lowest_X1  # not -inf, so `among`
    tied_XC = among_XC & (score_XC == lowest_X1)
    later_first_C = torch.arange(columns - 1, -1, -1, device=pos_XC.device)
    age_XC = (pos_XC.long() * columns + later_first_C).masked_fill(~tied_XC, -1)  # no two alike
    oldest_X1 = _nth_largest(age_XC, count_X1 - above_XC.sum(-1, keepdim=True), most)
    return (above_XC | (tied_XC & (age_XC >= oldest_X1))) & (count_X1 > 0)


def largest(x_XC: Tensor, count: int) -> Tensor:
    """Bool, the shape of x: exactly the `count` largest of every line (NaN above all); which of equal ones is nobody's promise.

    On a CPU numpy finds the lowest of them several times faster than topk ranks them all, and what reaches it are just
    these, unless some are equal.
    """
    if x_XC.device.type == "cpu" and 0 < count < x_XC.shape[-1] and x_XC.numel() and not torch.compiler.is_compiling():
        lines_NC = x_XC.detach().flatten(0, -2).numpy()  # on a CPU only, where there is no device to wait for
        threads = min(len(lines_NC), torch.get_num_threads()) if lines_NC.size >= THREADED else 1
        pieces = np.array_split(lines_NC, min(len(lines_NC), PIECES * threads) if threads > 1 else 1)
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            found = [*(pool.map if pool else map)(lambda piece_nC: _reach(piece_nC, count), pieces)]
        mask_NC = found[0] if threads == 1 else np.concatenate(found)
        if (np.count_nonzero(mask_NC, axis=-1) == count).all():
            return torch.from_numpy(mask_NC).view(x_XC.shape)
    return torch.zeros_like(x_XC, dtype=torch.bool).scatter_(-1, x_XC.topk(count, sorted=False).indices, True)


def _reach(lines_nC: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """What reaches the `count`-th largest of its line: at least `count` of each."""
    columns = lines_nC.shape[-1]
    lowest_n1 = np.partition(lines_nC, columns - count, axis=-1)[:, columns - count, None]
    reach_nC: NDArray[np.bool_] = ~(lines_nC < lowest_n1)  # NaN is the largest, as in topk
    return reach_nC


def _nth_largest(value_XC: Tensor, n_X1: Tensor, most: int) -> Tensor:
    """The n-th largest of each line, n in 1..most (the largest for a smaller n)."""
    return value_XC.topk(most, dim=-1).values.gather(-1, (n_X1 - 1).clamp(0))

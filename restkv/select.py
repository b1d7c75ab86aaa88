"""From scores to the entries that stay.

Letters: B batch rows, C entries of one head (columns), X KV heads or query heads.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECES = 4  # per thread: what one works on stays in its cache


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

    >>> score = torch.tensor([[[0.3, 0.1, 0.1, 0.9]]])
    >>> select(score, torch.arange(4).expand(1, 1, 4), score > 0.5, 3).tolist()
    [[[True, False, True, True]]]
    """
    exists_BXC = pos_BXC >= 0
    protected_BXC = protected_BXC & exists_BXC
    budget_BX = torch.as_tensor(budget, device=pos_BXC.device)
    if budget_BX.ndim == 1:
        budget_BX = budget_BX[:, None]
    max_count = budget if isinstance(budget, int) else None
    others_BXC = exists_BXC & ~protected_BXC
    return protected_BXC | top(score_BXC, pos_BXC, others_BXC, budget_BX - protected_BXC.sum(-1), max_count)


def top(score_XC: Tensor, pos_XC: Tensor, among_XC: Tensor, count_X: Tensor, max_count: int | None = None) -> Tensor:
    """The `count_X` best entries of every line (all of them where there are fewer, none where the count is negative).

    NaN counts as -inf; of equal scores the older position loses, of equal positions the later column. Two cuts find
    them, at the lowest score and at the oldest of the entries that share it, since topk alone breaks ties as it likes;
    that is several times faster than stable sorts. A CPU, where looking costs nothing, leaves the second out if none is needed.

    Args:
        score_XC, pos_XC: one line of entries each; any number of leading dimensions.
        among_XC: bool, the entries to choose from; their positions are at least 0.
        count_X: int, entries to take of each line.
        max_count: no count is larger, if the host knows such a number: saves time.

    Returns:
        bool, the shape of `among_XC`.
    """
    if torch.compiler.is_compiling():
        return _top_in_graph(score_XC, pos_XC, among_XC, count_X, max_count)
    columns = pos_XC.shape[-1]
    max_count = columns if max_count is None else min(max(max_count, 1), columns)
    count_X1 = torch.minimum(count_X, among_XC.sum(-1)).clamp(0)[..., None]
    if not columns:
        return among_XC
    score_XC = score_XC.masked_fill(~among_XC | score_XC.isnan(), -torch.inf)
    lowest_X1 = _nth_of_each(score_XC, count_X1, max_count)
    above_XC = score_XC > lowest_X1  # not -inf, so `among`
    tied_XC = among_XC & (score_XC == lowest_X1)
    left_X1 = count_X1 - above_XC.sum(-1, keepdim=True)
    # No sync, here and below: numpy sees what is on a CPU only.
    if _numpy_sees(tied_XC) and (tied_XC.numpy().sum(-1, keepdims=True) <= left_X1.numpy()).all():
        return (above_XC | tied_XC) & (count_X1 > 0)
    later_first_C = torch.arange(columns - 1, -1, -1, device=pos_XC.device)
    age_XC = (pos_XC.long() * columns + later_first_C).masked_fill(~tied_XC, -1)  # no two alike
    oldest_X1 = _nth_of_each(age_XC, left_X1, max_count)
    return (above_XC | (tied_XC & (age_XC >= oldest_X1))) & (count_X1 > 0)


def largest(x_XC: Tensor, count: int) -> Tensor:
    """Columns of the `count` largest of every line, in any order; which of equal ones is nobody's promise. [..., count] long.

    On a CPU numpy finds the lowest of them several times faster than topk ranks them all.
    """
    if torch.compiler.is_compiling():
        return _largest_in_graph(x_XC, count)
    lines_NC = _numpy_lines(x_XC, count)
    if lines_NC is not None:
        threads = min(len(lines_NC), torch.get_num_threads())
        pieces = np.array_split(lines_NC, min(len(lines_NC), PIECES * threads))
        found = _threads(threads).map(lambda piece_nC: _largest_of_few(piece_nC, count), pieces)
        return torch.from_numpy(np.concatenate([*found])).view(*x_XC.shape[:-1], count)
    return x_XC.topk(count, sorted=False).indices


def nth_largest(x_XC: Tensor, count: int) -> Tensor:
    """The `count`-th largest of every line [..., 1]: better than `largest` where most are taken, of a cache that has outgrown its
    budget a little.
    """
    if torch.compiler.is_compiling():
        return _nth_largest_in_graph(x_XC, count)
    lines_NC = _numpy_lines(x_XC, count)
    if lines_NC is None:
        return x_XC.topk(count).values[..., -1:].clone(memory_format=torch.contiguous_format)
    place = lines_NC.shape[-1] - count
    return torch.from_numpy(np.partition(lines_NC, place, axis=-1)[:, place].copy()).view(*x_XC.shape[:-1], 1)


def _numpy_lines(x_XC: Tensor, count: int) -> NDArray[Any] | None:
    """The lines as numpy sees them, where it can be asked and there is something to leave out."""
    if not _numpy_sees(x_XC) or not x_XC.numel() or not 0 < count < x_XC.shape[-1]:
        return None
    lines_NC: NDArray[Any] = x_XC.detach().flatten(0, -2).numpy()  # no sync: on a CPU there is no device to wait for
    return lines_NC


def _numpy_sees(x: Tensor) -> bool:
    """Whether numpy may read it: on a CPU, in a dtype it has."""
    return x.device.type == "cpu" and x.dtype != torch.bfloat16


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Kept: they are needed again in every layer, and starting them is not free."""
    return ThreadPoolExecutor(count)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay behind in the parent


def _largest_of_few(lines_nC: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Columns of the `count` largest of each line, line after line: what reaches the smallest of them, less equals beyond it."""
    reaching_nC = _reaching(lines_nC, count)
    for line in np.flatnonzero(np.count_nonzero(reaching_nC, axis=-1) > count):
        reaching_nC[line] = False
        reaching_nC[line, np.argpartition(lines_nC[line], -count)[-count:]] = True
    return np.flatnonzero(reaching_nC) % lines_nC.shape[-1]


def _reaching(lines_nC: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Bool: what reaches the `count`-th largest of its line."""
    place = lines_nC.shape[-1] - count
    reaching_nC: NDArray[np.bool_] = ~(lines_nC < np.partition(lines_nC, place, axis=-1)[:, place, None])
    return reaching_nC  # NaN is the largest, as in topk


def _nth_of_each(value_XC: Tensor, n_X1: Tensor, max_count: int) -> Tensor:
    """The n-th largest of each line, n in 1..max_count (the largest for a smaller n); no value is NaN."""
    if not _numpy_sees(value_XC):
        return value_XC.topk(max_count, dim=-1).values.gather(-1, (n_X1 - 1).clamp(0))
    lines_NC = value_XC.detach().flatten(0, -2).numpy()  # no sync: a CPU
    place_N = lines_NC.shape[-1] - n_X1.flatten().clamp(1).numpy()
    if (place_N == place_N[:1]).all():
        nth_N = np.partition(lines_NC, place_N[:1], axis=-1)[:, place_N[0]]
    else:
        nth_N = np.array([np.partition(*line)[line[1]] for line in zip(lines_NC, place_N, strict=True)])
    return torch.from_numpy(nth_N).view(n_X1.shape)


# The same functions as operators, which a graph calls without looking inside: a CPU's are made of numpy's.


@torch.library.custom_op("restkv::top", mutates_args=())
def _top_in_graph(
    score_XC: Tensor, pos_XC: Tensor, among_XC: Tensor, count_X: Tensor, max_count: int | None = None
) -> Tensor:
    return top(score_XC, pos_XC, among_XC, count_X, max_count).clone()  # an operator returns nothing that it was given


@torch.library.custom_op("restkv::largest", mutates_args=())
def _largest_in_graph(x_XC: Tensor, count: int) -> Tensor:
    return largest(x_XC, count)


@torch.library.custom_op("restkv::nth_largest", mutates_args=())
def _nth_largest_in_graph(x_XC: Tensor, count: int) -> Tensor:
    return nth_largest(x_XC, count)


@_top_in_graph.register_fake
def _(score_XC: Tensor, pos_XC: Tensor, among_XC: Tensor, count_X: Tensor, max_count: int | None = None) -> Tensor:
    return among_XC.new_empty(among_XC.shape)


@_largest_in_graph.register_fake
def _(x_XC: Tensor, count: int) -> Tensor:
    return x_XC.new_empty(*x_XC.shape[:-1], count, dtype=torch.long)


@_nth_largest_in_graph.register_fake
def _(x_XC: Tensor, count: int) -> Tensor:
    return x_XC.new_empty(*x_XC.shape[:-1], 1)

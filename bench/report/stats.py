"""Means with bootstrap intervals, and paired differences.

A statistic is the mean over groups (tasks, say) of the means of their values; a draw replaces every group by as many of its
own values, with replacement. The interval is the percentile one. Where all values are equal it has no width: that says
nothing about samples not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
INTERVAL = (0.025, 0.975)
Values = Mapping[Any, Mapping[Any, float]]  # group -> sample -> value


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return self.show()

    def show(self, digits: int = 3, sign: str = "-") -> str:
        """As in 0.812 [0.760, 0.861]; sign="+" marks positive numbers too."""
        mean, low, high = (f"{x:{sign}.{digits}f}" for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def through(self, rising: Callable[[float], float]) -> Estimate:
        """The estimate of a rising function of what was estimated."""
        return Estimate(rising(self.mean), rising(self.low), rising(self.high), self.n)


def exp(x: float) -> float:
    """e^x; infinite where it is too large for a number."""
    return math.exp(x) if x < 709 else math.inf


def mean_interval(*groups: Sequence[float], confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of the groups' means (one group: the mean) with a bootstrap interval.

    The same values in the same order give the same interval.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    assert arrays and all(array.size for array in arrays), "a mean needs values"
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for array in arrays:
        # A block of draws at a time, so that a group of any size fits into memory.
        block = max(1, 2_000_000 // array.size)
        for start in range(0, draws, block):
            count = min(block, draws - start)
            picked = rng.integers(array.size, size=(count, array.size))
            means[start : start + count] += array[picked].mean(1) / len(arrays)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = float(np.mean([array.mean() for array in arrays]))
    return Estimate(mean, float(low), float(high), sum(array.size for array in arrays))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """sum(above) / sum(below) with a bootstrap interval that draws pairs: nats over words of texts of unequal length, say."""
    above_n, below_n = (np.asarray(values, dtype=np.float64) for values in (above, below))
    assert above_n.size and above_n.size == below_n.size, "a ratio needs pairs of values"
    picked = np.random.default_rng(0).integers(above_n.size, size=(DRAWS, above_n.size))
    low, high = np.quantile(above_n[picked].sum(1) / below_n[picked].sum(1), INTERVAL)
    return Estimate(float(above_n.sum() / below_n.sum()), float(low), float(high), above_n.size)


def paired_difference(ours: Values, theirs: Values) -> Estimate | None:
    """Mean of ours - theirs over the samples both have, group by group; None where they have none in common."""
    both = [(ours[group], theirs[group]) for group in ours if group in theirs]
    differences = [[one[sample] - other[sample] for sample in one if sample in other] for one, other in both]
    groups = [group for group in differences if group]
    return mean_interval(*groups) if groups else None


def grouped(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the values of some of their fields, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups

"""The slow twin of refits: reference queries and what they get from a dense model that has read everything, and the fit of a head
by plain least squares, in float64 and in loops.

Letters: L prompt length, M reference queries of a head's group, n kept entries, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from twins.probed import Text

Array = NDArray[np.float64]


def reference(
    text: Text, layer: int, kv: int, query: int, head: int, length: int, gap: int
) -> tuple[float, Array, float]:
    """What a query head's query at a position gets from a prompt of so many tokens: log-sum-exp, output, and the root of the
    share of its whole attention that goes there.
    """
    config, window = text.config, text.model.blocks[layer].window
    q_D = text.q[layer][query, head].double().numpy()
    prompt, other, values = [], [], []
    for p in range(query + 1):
        if window is not None and p <= query - window:
            continue
        logit = float(q_D @ text.k[layer][p, kv].double().numpy()) * config.attn_scale
        if config.attn_softcap is not None:
            logit = config.attn_softcap * math.tanh(logit / config.attn_softcap)
        if p < length and not (gap and p >= query - gap):
            prompt.append(logit)
            values.append(text.v[layer][p, kv].double().numpy())
        else:
            other.append(logit)
    if not prompt:
        return 0.0, np.zeros(len(q_D)), 0.0
    top = max(prompt + other)
    mass, rest = sum(math.exp(x - top) for x in prompt), sum(math.exp(x - top) for x in other)
    out_D = sum((math.exp(x - top) / mass * v_D for x, v_D in zip(prompt, values, strict=True)), np.zeros(len(q_D)))
    return top + math.log(mass), out_D, math.sqrt(mass / (mass + rest))


def weights(share_Mn: Array, bias_n: Array) -> Array:
    """Softmax weights over the kept entries, row by row."""
    rows = []
    for share_n in share_Mn:
        part_n = np.array([share * math.exp(bias) for share, bias in zip(share_n, bias_n, strict=True)])
        rows.append(part_n / part_n.sum() if part_n.sum() > 0 else part_n)
    return np.array(rows)


def error(share_Mn: Array, bias_n: Array, v_nD: Array, out_MD: Array, weight_M: Array) -> float:
    missed_MD = weights(share_Mn, bias_n) @ v_nD - out_MD
    return float(sum(u * u * (row_D @ row_D) for u, row_D in zip(weight_M, missed_MD, strict=True)))


def values(share_Mn: Array, bias_n: Array, v_nD: Array, out_MD: Array, weight_M: Array, ridge: float) -> Array:
    """Ridge regression towards the old values, as least squares of the change: the queries' rows, and one for every entry."""
    p_Mn = weights(share_Mn, bias_n) * weight_M[:, None]
    root = math.sqrt(ridge * (p_Mn**2).sum() / p_Mn.shape[1])
    rows_n = np.concatenate([p_Mn, root * np.eye(p_Mn.shape[1])])
    missed_MD = out_MD * weight_M[:, None] - p_Mn @ v_nD
    return v_nD + np.linalg.lstsq(rows_n, np.concatenate([missed_MD, 0 * v_nD]), rcond=None)[0]


def nonnegative(a_Mn: Array, b_M: Array) -> Array:
    """x >= 0 of the least |a x - b|, by the active sets of Lawson and Hanson (1974)."""
    n = a_Mn.shape[1]
    x_n, free = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(10 * n):
        slope_n = a_Mn.T @ (b_M - a_Mn @ x_n)
        if free.all() or slope_n[~free].max() <= 1e-12 * max(1e-300, float((a_Mn**2).sum())):
            break
        free[np.where(free, -np.inf, slope_n).argmax()] = True
        while True:
            best_n = np.zeros(n)
            best_n[free] = np.linalg.lstsq(a_Mn[:, free], b_M, rcond=None)[0]
            if not (free & (best_n <= 0)).any():
                break
            back = free & (best_n <= 0)
            x_n = x_n + min(x_n[back] / (x_n[back] - best_n[back])) * (best_n - x_n)
            free &= x_n > 1e-14
            x_n[~free] = 0
        x_n = best_n
    return x_n


def shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """One at a time, to whoever has the fewest and can take another, the smaller first."""
    given = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    while sum(given) < min(total, sum(sizes)):
        index = min((i for i in order if given[i] < sizes[i]), key=lambda i: given[i])
        given[index] += 1
    return given

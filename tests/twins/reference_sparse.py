"""Slow twins of sparse prefill: patterns by loops over pairs of tokens, attention through a mask of every pair, all in float64.

Letters: L prompt length, M blocks of it, W last queries, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from restkv.patterns import AShape, FlexPrefill, Pattern, VerticalSlash

Pair = Callable[[int, int], bool]  # (query, key) of positions


def mask_of(listed_HMM: Tensor, size: int, length: int, window: int | None) -> Tensor:
    """Bool [H, L, L]: what every query sees when only these blocks are computed."""
    heads = len(listed_HMM)
    seen_HLL = torch.zeros(heads, length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            if window is None or q - k < window:
                seen_HLL[:, q, k] = listed_HMM[:, q // size, k // size]
    return seen_HLL


def masked_weights(q_HLD: Tensor, k_KLD: Tensor, seen_HLL: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Softmax weights [H, L, L]."""
    k_HLD = k_KLD.repeat_interleave(len(q_HLD) // len(k_KLD), 0)
    logits = q_HLD.double() @ k_HLD.double().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~seen_HLL, -torch.inf).softmax(-1)


def masked_output(weights_HLL: Tensor, v_KLD: Tensor) -> Tensor:
    """Attention output [H, L, D]."""
    return weights_HLL @ v_KLD.double().repeat_interleave(len(weights_HLL) // len(v_KLD), 0)


def blocks_with(pair: Pair, length: int, size: int) -> Tensor:
    """Bool [M, M]: blocks that hold a causal pair of tokens of a kind."""
    blocks = math.ceil(length / size)
    listed_MM = torch.zeros(blocks, blocks, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            if pair(q, k):
                listed_MM[q // size, k // size] = True
    return listed_MM


def _in_a_shape(pattern: AShape, q: int, k: int) -> bool:
    return k < pattern.sinks or q - k < pattern.local


def choose_slowly(
    pattern: Pattern, q_HLD: Tensor, k_KLD: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Bool [H, M, M]: what Pattern.choose should list."""
    heads, length, _ = q_HLD.shape
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        causal_LL &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    weights_HLL = masked_weights(q_HLD, k_KLD, causal_LL.expand(heads, -1, -1), scale, softcap)
    # With the whole prompt padded to blocks, which pairs of blocks are in reach does not depend on the last one's tokens.
    padded = math.ceil(length / pattern.block) * pattern.block
    reach_MM = blocks_with(lambda q, k: window is None or q - k < window, padded, pattern.block)
    listed = []
    for head in range(heads):
        k_LD = k_KLD[head // (heads // len(k_KLD))].double()
        if isinstance(pattern, AShape):
            one = blocks_with(partial(_in_a_shape, pattern), padded, pattern.block)
        elif isinstance(pattern, VerticalSlash):
            one = _vertical_slash(pattern, weights_HLL[head], padded)
        else:
            assert isinstance(pattern, FlexPrefill)
            one = _flexprefill(pattern, weights_HLL[head], q_HLD[head].double(), k_LD, scale, softcap, reach_MM)
        listed.append((one | torch.eye(len(one), dtype=torch.bool)) & reach_MM)
    return torch.stack(listed)


def _sums(weights_LL: Tensor, queries: int) -> tuple[list[float], list[float]]:
    """Mean attention of the last queries by column and by distance."""
    length = len(weights_LL)
    vertical, slash = [0.0] * length, [0.0] * length
    for q in range(length - queries, length):
        for k in range(q + 1):
            vertical[k] += float(weights_LL[q, k]) / queries
            slash[q - k] += float(weights_LL[q, k]) / queries
    return vertical, slash


def _largest(values: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def _vertical_slash(pattern: VerticalSlash, weights_LL: Tensor, padded: int) -> Tensor:
    vertical, slash = _sums(weights_LL, min(64, len(weights_LL)))
    columns = _largest([math.inf if k < 30 else x for k, x in enumerate(vertical)], pattern.vertical)
    distances = _largest([math.inf if d < 100 else x for d, x in enumerate(slash)], pattern.slash)
    return blocks_with(lambda q, k: k in columns or q - k in distances, padded, pattern.block)


def _pooled(values: Sequence[float], size: int) -> list[float]:
    return [math.fsum(values[start : start + size]) for start in range(0, len(values), size)]


def _flexprefill(
    pattern: FlexPrefill,
    weights_LL: Tensor,
    q_LD: Tensor,
    k_LD: Tensor,
    scale: float,
    softcap: float | None,
    reach_MM: Tensor,
) -> Tensor:
    size, blocks = pattern.block, len(reach_MM)

    def softmax(logits: Tensor, row: int) -> list[float]:
        seen = [c for c in range(blocks) if reach_MM[row, c]]
        capped = {c: float(logits[c]) * scale for c in seen}
        if softcap is not None:
            capped = {c: softcap * math.tanh(x / softcap) for c, x in capped.items()}
        total = math.fsum(math.exp(x) for x in capped.values())
        return [math.exp(capped[c]) / total if c in capped else 0.0 for c in range(blocks)]

    def means(x_LD: Tensor) -> Tensor:
        return torch.stack([part.mean(0) for part in x_LD.split(size)])

    vertical, slash = _sums(weights_LL, size)
    column, distance = _pooled(vertical, size), _pooled(slash, size)
    guess = softmax(means(k_LD) @ q_LD[-size:].mean(0), blocks - 1)
    divergence = 0.0
    for p, q in zip(guess, column, strict=True):
        for x in (p, q):
            divergence += x * math.log(x / ((p + q) / 2)) / 2 if x > 0 else 0.0
    aware = math.sqrt(max(divergence, 0.0)) < pattern.tau
    least = math.ceil(pattern.min_budget / size)
    most = blocks if pattern.max_budget is None else math.ceil(pattern.max_budget / size)

    def count(values: Sequence[float]) -> int:
        total, covered = 0.0, 0
        for x in sorted(values, reverse=True):
            total += x
            covered += total <= pattern.gamma
        return least if aware else min(max((covered + 1) // size + 1, least), max(most, least))

    column_count, distance_count = count(vertical), count(slash)
    columns = _largest([math.inf, *column[1:]], column_count)
    distances = _largest([math.inf, *distance[1:]], distance_count)
    listed_MM = torch.zeros(blocks, blocks, dtype=torch.bool)
    for r in range(blocks):
        for c in range(r + 1):
            listed_MM[r, c] = c in columns or r - c in distances
    if aware:
        q_MD, k_MD = means(q_LD), means(k_LD)
        cells = [(x, r, c) for r in range(blocks) for c, x in enumerate(softmax(k_MD @ q_MD[r], r)) if x > 0]
        total = 0.0
        for x, r, c in sorted(cells, key=lambda cell: (-cell[0], cell[1], cell[2])):
            if total >= pattern.gamma * blocks - 1e-9:
                break
            total += x
            listed_MM[r, c] = True
    return listed_MM

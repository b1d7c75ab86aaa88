"""The slow twin of scoring, smoothing and selection: float64, one head, one query, one entry at a time.

After docs/sources.md §1 and §2.

It shares no code with restkv/: W_O is applied as it is (no root of it), windows are summed one by one, selection is a sort.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

NOTHING = -math.inf


class Head:
    """One query head of one batch row: what it holds, in order of position, and how each observed query attends to it."""

    def __init__(self, obs, b, h):
        k_head = h // (obs.q.shape[1] // obs.k.shape[1])
        pos = obs.pos[b, k_head].tolist()
        has = [p >= 0 and (obs.keep is None or bool(obs.keep[b, h, c])) for c, p in enumerate(pos)]
        self.columns = sorted((c for c in range(len(pos)) if has[c]), key=lambda c: pos[c])
        self.pos = [pos[c] for c in self.columns]
        self.v = [obs.v[b, k_head, c].double().numpy() for c in self.columns]
        keys = [obs.k[b, k_head, c].double().numpy() for c in self.columns]
        rows = [(w, p) for w, p in enumerate(obs.q_pos[b].tolist()) if p >= 0]
        first = obs.end if obs.end is not None else rows[0][1] if rows else 0
        self.newest = rows[-1][1] if rows else -1
        self.stream, self.normed = (
            [1.0] * len(rows) if sizes is None else [float(sizes[b, w]) for w, _ in rows]
            for sizes in (obs.stream, obs.normed)
        )
        self.past = [i for i, p in enumerate(self.pos) if p < first]
        self.seen = [self.softmax(obs, obs.q[b, h, w].double().numpy(), p, keys) for w, p in rows]
        self.attention = self.seen  # less what is too near to count
        if obs.gap:
            lines = zip(rows, self.seen, strict=True)
            self.attention = [
                [a if p < q_pos - obs.gap else 0.0 for a, p in zip(line, self.pos, strict=True)]
                for (_, q_pos), line in lines
            ]

    def softmax(self, obs, q, q_pos, keys):
        exps = []
        for p, key in zip(self.pos, keys, strict=True):
            x = float(q @ key) * obs.softmax_scale
            if obs.softcap is not None:
                x = obs.softcap * math.tanh(x / obs.softcap)
            hidden = p > q_pos or (obs.sliding_window is not None and p <= q_pos - obs.sliding_window)
            exps.append(0.0 if hidden else math.exp(x))
        total = sum(exps)
        return [e / total for e in exps] if total else exps

    def output(self, attention, entries):
        return sum((attention[i] * self.v[i] for i in entries), np.zeros_like(self.v[0]) if self.v else 0.0)


def ema(values, alpha):
    """EMA of a list, oldest first, by its recursion (docs/sources.md §1.1 item 3)."""
    state = values[0]
    for value in values[1:]:
        state = alpha * value + (1 - alpha) * state
    return state


def over_time(policy, values):
    if not values:
        return 0.0
    return sum(values) / len(values) if policy.alpha is None else ema(values, policy.alpha)


def removal(heads, attention, seen, outputs, i, projections, policy):
    """Length of the change of the summed outputs of `heads` when their common entry i goes, and of that output itself.

    attention, seen: weights that count, and all.
    """
    change = whole = 0.0
    for head, a, all_of, o, w_o in zip(heads, attention, seen, outputs, projections, strict=True):
        odds = a[i] / max(1 - all_of[i], np.finfo(np.float64).eps)
        change = change + w_o @ (odds * (o - head.v[i]))
        whole = whole + w_o @ o
    size: Any = np.linalg.norm(change)
    if policy.tau != 1:
        (a,), (all_of,) = attention, seen
        odds = a[i] / max(1 - all_of[i], np.finfo(np.float64).eps)
        size = odds * np.linalg.norm(change / odds) ** policy.tau if odds else 0.0
    return size / np.linalg.norm(whole) if policy.normalize else size


def rest_line(heads, projections, policy, budget):
    """Smoothed ReST-KV scores of the past entries of one scored head (a group of several for gqa="joint")."""
    past = heads[0].past
    if policy.aggregate == "attention":
        mixed: list[list[float]] = []
        seen: list[list[float]] = []
        for head in heads:
            for rows, into in ((head.attention, mixed), (head.seen, seen)):
                columns = range(len(head.pos))
                into.append([over_time(policy, [row[i] for row in rows]) if i in past else 0.0 for i in columns])
        outputs = [head.output(a, past) for head, a in zip(heads, seen, strict=True)]
        line = [removal(heads, mixed, seen, outputs, i, projections, policy) for i in past]
    else:
        line = []
        for i in past:
            per_query = []
            for w in range(len(heads[0].attention)):
                attention = [head.attention[w] for head in heads]
                seen = [head.seen[w] for head in heads]
                outputs = [head.output(a, range(len(a))) for head, a in zip(heads, seen, strict=True)]
                size = removal(heads, attention, seen, outputs, i, projections, policy)
                per_query.append(size / heads[0].stream[w] if policy.relative else size)
            line.append(max(per_query, default=0.0) if policy.reduction == "max" else over_time(policy, per_query))
    if policy.pooling == "adaptive":
        return adaptive(line, *kernel_and_shift([drift(head, policy, budget) for head in heads], policy))
    return pooled(line, policy)


def drift(head, policy, budget):
    """Mean place of the entries the older queries look at most, minus the newer ones' (docs/sources.md §1.2 item 7)."""
    kept = max(1, budget - policy.window)
    halves: tuple[list[int], list[int]] = ([], [])
    for w, row in enumerate(head.seen):
        ranked = [i for i, a in enumerate(row) if a > 0 and (policy.drift == "released" or i in head.past)]
        top = sorted(ranked, key=lambda i: row[i])[-kept:]
        halves[w >= len(head.seen) // 2].extend(top)
    if not halves[0] or not halves[1]:
        return None
    return sum(halves[0]) / len(halves[0]) - sum(halves[1]) / len(halves[1])


def kernel_and_shift(drifts, policy):
    if any(t is None for t in drifts):
        return policy.kernel_size, 0
    t = sum(drifts) / len(drifts)
    kernel = max(policy.kernel_size, 2 * math.floor(abs(t) / policy.scale) + 1)
    if policy.drift == "symmetric":
        return kernel, int(math.copysign(math.floor(abs(t) / policy.scale), t))
    return kernel, math.floor(t / policy.scale) if t > 0 else math.floor(t / policy.scale) + 1


def adaptive(line, kernel, shift):
    out = []
    for i in range(len(line)):
        places = range(i + shift - kernel // 2, i + shift + kernel // 2 + 1)
        out.append(sum(line[min(max(j, 0), len(line) - 1)] for j in places) / kernel)
    return out


def pooled(line, policy):
    """Fixed kernels, with zeros beyond both ends that an average counts (docs/sources.md §1.2 item 6)."""
    if policy.pooling == "none":
        return line
    half = policy.kernel_size // 2
    out = []
    for i in range(len(line)):
        window = [line[j] if 0 <= j < len(line) else 0.0 for j in range(i - half, i + half + 1)]
        out.append(max(window) if policy.pooling == "max" else sum(window) / policy.kernel_size)
    return out


def snap_line(heads, projections, policy, budget):
    (head,) = heads
    over = max if policy.reduction == "max" else sum
    return pooled([over(row[i] for row in head.attention) for i in head.past], policy)


def zip_line(heads, projections, policy, budget):
    (head,) = heads
    return [max((row[i] for row in head.attention), default=0.0) for i in head.past]


def zip_plus_line(heads, projections, policy, budget):
    (head,), (w_o,) = heads, projections
    sized = [[a / size for a in row] for row, size in zip(head.attention, head.normed, strict=True)]
    return [max((row[i] for row in sized), default=0.0) * np.linalg.norm(w_o @ head.v[i]) for i in head.past]


LINES = {
    "restkv": rest_line,
    "snapkv": snap_line,
    "adakv": snap_line,
    "pyramidkv": snap_line,
    "kvzip": zip_line,
    "kvzip-plus": zip_plus_line,
}


def scores(policy, obs, w_o_EHD=None):
    """What policy.score(obs) must give in the columns of past entries; NaN where nothing is promised (window columns)."""
    B, H = obs.q.shape[:2]
    K, C = obs.k.shape[1:3]
    G = H // K
    line_of = LINES[policy.name]
    per_head = policy.granularity == "query"
    out = np.full((B, H if per_head else K, C), NOTHING)
    for b in range(B):
        budget = obs.budget_B
        budget = policy.budget if budget is None else budget if isinstance(budget, int) else int(budget[b])
        heads = [Head(obs, b, h) for h in range(H)]
        w_o = [None if w_o_EHD is None else w_o_EHD[:, h].double().numpy() for h in range(H)]
        if not getattr(policy, "output_weight", True):
            w_o = [np.eye(obs.q.shape[-1])] * H
        for x in range(out.shape[1]):
            members = [x] if per_head else list(range(x * G, (x + 1) * G))
            if policy.gqa == "joint":
                line = line_of([heads[h] for h in members], [w_o[h] for h in members], policy, budget)
            else:
                lines = np.array([line_of([heads[h]], [w_o[h]], policy, budget) for h in members])
                line = lines.mean(0) if policy.gqa == "mean" else lines.max(0)
            head = heads[members[0]]
            for i, c in enumerate(head.columns):
                gone = obs.sliding_window is not None and head.pos[i] <= head.newest + 1 - obs.sliding_window
                out[b, x, c] = NOTHING if gone else line[i] if i in head.past else math.nan
    return out


def select(score, pos, protected, budget):
    """Kept columns of one head: protected first, then by score, of equal scores the newer."""
    entries = [c for c, p in enumerate(pos) if p >= 0]
    held = [c for c in entries if protected[c]]
    value = [NOTHING if math.isnan(s) else s for s in score]
    ranked = sorted((c for c in entries if not protected[c]), key=lambda c: (value[c], pos[c]), reverse=True)
    return set(held) | set(ranked[: max(0, budget - len(held))])


def without(attention, i):
    """Softmax weights after entry i is deleted: the rest, renormalised."""
    others = sum(a for j, a in enumerate(attention) if j != i)
    return [0.0 if j == i else a / others for j, a in enumerate(attention)]

"""The slow twins of restkv/budgets.py: one entry, one head, one layer at a time.

After docs/sources.md §1.3, §2.6, §2.7 and docs/budgets.md.

Everything is a list of Python numbers, shares are exact fractions, and every selection is a sort. A layer is given as lists
[head][column] of scores, positions (-1 = no entry) and flags; a kept set is a set of (head, column), or for a whole model of
(layer, head, column).
"""

from __future__ import annotations

import math
from fractions import Fraction

NOTHING = -math.inf


def pyramid(budget, window, num_layers, length, beta=20, middle_regime=True):
    """The released code's integers, but never a layer without entries."""
    base = budget - window
    if length < budget or (middle_regime and length < 2 * base) or num_layers == 1:
        return [budget] * num_layers
    least = base // beta
    if least + window == 0:
        least = 1
    most = 2 * base - least
    if most >= length - window:
        most = length - window
        least = 2 * base - most
    step = (most - least) // (num_layers - 1)
    return [most - layer * step + window for layer in range(num_layers)]


def pyramid_line(budget, window, num_layers, length, beta=20):
    """The line between the first and the last layer that the whole numbers stand for."""
    base = budget - window
    most = min(2 * base - (base // beta or int(window == 0)), length - window)
    return [window + most - Fraction(2 * (most - base) * layer, num_layers - 1) for layer in range(num_layers)]


def adakv(score, pos, protected, budget, floor=0.2, normalize=False, exact=True):
    heads = range(len(pos))
    held = {(x, c) for x in heads for c, p in enumerate(pos[x]) if p >= 0 and protected[x][c]}
    past = {(x, c) for x in heads for c, p in enumerate(pos[x]) if p >= 0} - held
    value = {(x, c): worst_if_nan(score[x][c]) for x, c in past}
    total = max(0, len(heads) * budget - len(held))
    base = total // len(heads)
    floor = Fraction(str(floor))

    def best_first(entries, by):
        return sorted(entries, key=lambda e: (by[e], pos[e[0]][e[1]], -e[0]), reverse=True)

    weighted = dict(value)
    if normalize:
        for x in heads:
            mine = best_first((e for e in past if e[0] == x), value)
            everything = math.fsum(value[e] for e in mine if math.isfinite(value[e]))
            top = math.fsum(value[e] for e in mine[:base] if math.isfinite(value[e]))
            for e in mine:
                if everything and math.isfinite(value[e]):
                    weighted[e] = value[e] * (top / everything)

    winners = best_first(past, weighted)[:total]
    keep = set(held)
    for x in heads:
        won = sum(e[0] == x for e in winners)
        if exact:
            capacity = math.floor(won * (1 - floor) + Fraction(total, len(heads)) * floor)
        else:
            capacity = round(won * (1 - float(floor)) + math.floor(base * floor))  # floating point, as released
        mine = best_first((e for e in past if e[0] == x), value)
        keep |= {e for e in mine[:capacity] if value[e] > NOTHING}
    if exact:
        left = max(0, len(heads) * budget - len(keep))
        keep |= set(best_first(past - keep, weighted)[:left])
    return keep


def whole_model(layers, budget, floor):
    """Global: layers is a list of (score, pos, protected)."""
    sure, rest, heads = set(), {}, 0
    for n, (score, pos, protected) in enumerate(layers):
        for x in range(len(pos)):
            heads += 1
            entries = [c for c, p in enumerate(pos[x]) if p >= 0]
            held = [c for c in entries if protected[x][c]]
            others = [c for c in entries if not protected[x][c]]
            value = {c: worst_if_nan(score[x][c]) for c in others}
            others.sort(key=lambda c: (value[c], pos[x][c]), reverse=True)
            granted = max(0, math.floor((budget - len(held)) * Fraction(str(floor))))
            own = {c for c in others[:granted] if value[c] > NOTHING}
            sure |= {(n, x, c) for c in own.union(held)}
            rest.update({(n, x, c): (value[c], pos[x][c], -n, -x) for c in others if c not in own})
    left = max(0, heads * budget - len(sure))
    return sure | set(sorted(rest, key=rest.__getitem__, reverse=True)[:left])


def worst_if_nan(score):
    return NOTHING if math.isnan(score) else score

"""The oracle gap: how far a kept set is from what greedy backward elimination keeps, by the layer's true output error.

Elimination starts from all entries of a KV head and removes, one at a time, the entry whose loss leaves the head's
output (its group's outputs summed after W_O) nearest to the full one, on top of all that has gone before. It runs twice:

    future    judged by the tail's queries, which no policy can know: what a set of that size could be worth
    window    judged by the prompt's last queries, which is what policies go by: the price of not knowing the future

So error - window is what a score loses by its approximation (one removal at a time, smoothing, reductions over a group), and
window - future what it loses for want of foresight. Both oracles keep the newest entries, as policies do, and
as many entries of each KV head as the policy they are compared with.

Letters: P context, C columns, W judging queries, K KV heads, G query heads per KV head, H = K * G, D head dim, E hidden width,
F <= E coordinates of a group's outputs, Y = 2 G + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from bench.quality.kept import kept_masks
from bench.quality.outputs import LayerTrace, observation, tail_error
from restkv.lm import LM
from restkv.observe import Observation, attention_BHWC
from restkv.policies import Policy
from restkv.session import Session

WINDOW = 32  # newest entries that stay and queries that judge, unless half the budget is less


class Oracle:
    """Eliminations on one window of text, made when they are first needed.

    Args:
        layers: a full pass over context and tail, with the queries of all tokens (bench.quality.outputs.full_pass).
        context: P, tokens that may be evicted.
    """

    def __init__(self, lm: LM, layers: Sequence[LayerTrace], context: int) -> None:
        self._lm, self._layers, self._context = lm, layers, context
        self._orders: dict[tuple[str, int, int], Tensor] = {}

    def gap(self, session: Session, policy: Policy, row: int = 0) -> dict[str, Any]:
        """Per layer: relative output error over the tail of the set that a policy left in a session's row, of both oracles', and
        how much of the future oracle's choice that set shares. None for policies that renumber positions."""
        if policy.slot_positions:
            return dict.fromkeys(("error", "window_error", "future_error", "overlap"))
        gaps: dict[str, list[float]] = {"error": [], "window_error": [], "future_error": [], "overlap": []}
        for index, keep_HP in enumerate(kept_masks(session, self._context, row)):
            obs = self._observation(index, "future", 0)
            group = obs.group
            union_KP = reduce(keep_HP, "(K G) P -> K P", "any", G=group)
            newest = min(WINDOW, int(union_KP.sum()) // len(union_KP) // 2, int(union_KP.sum(-1).min()))
            gaps["error"].append(tail_error(self._lm, obs, keep_HP))
            for kind in ("window", "future"):
                best_KP = self._best(index, kind, newest, union_KP.sum(-1))
                gaps[f"{kind}_error"].append(tail_error(self._lm, obs, repeat(best_KP, "K P -> (K G) P", G=group)))
            old = self._context - newest
            shared, chosen = (union_KP & best_KP)[:, :old].sum(), best_KP[:, :old].sum()
            gaps["overlap"].append(float(shared / chosen.clamp(min=1)))
        return gaps

    def _best(self, index: int, kind: str, newest: int, count_K: Tensor) -> Tensor:
        """Bool [K, P]: what elimination leaves when each head has as many entries as it may keep."""
        key = (kind, index, newest)
        if key not in self._orders:
            obs = self._observation(index, kind, newest)
            self._orders[key] = elimination_order(self._lm, obs, self._context - newest)
        order_KN = self._orders[key]
        gone_KN = torch.arange(order_KN.shape[1], device=order_KN.device) < self._context - count_K[:, None]
        keep_KP = torch.ones(len(order_KN), self._context, dtype=torch.bool, device=order_KN.device)
        return keep_KP.scatter(1, order_KN, ~gone_KN)

    def _observation(self, index: int, kind: str, newest: int) -> Observation:
        trace = self._layers[index]
        length = trace.k_KLD.shape[1]
        if kind == "future":
            return observation(self._lm, index, trace, length, length - self._context)
        return observation(self._lm, index, trace, self._context, max(newest, 1))


def elimination_order(lm: LM, obs: Observation, removable: int) -> Tensor:
    """The first `removable` columns of every KV head in the order in which greedy elimination removes them: [K, removable].

    With a an entry's share of what a head still attends to, o the head's output of now and w the entry's value after W_O, losing
    it moves o by a / (1 - a) * (o - w); for the head's most attended entry, where that is 0 / 0 before long, by r - o, r
    being the output of all others (as in restkv/policies/rest.py). The squared distance to the full output is then a quadratic
    form in the inner products of o, r, w and the distance so far, with coefficients of at most 1: a step costs K * W * C * Y^2
    multiplications instead of ones over the width E, and float64 keeps eight digits. Of equal entries the older goes first.
    """
    K, C = obs.k.shape[1:3]
    a_KGWC = rearrange(attention_BHWC(obs), "1 (K G) W C -> K G W C", K=K)
    w_KGCF = _values_after_projection(lm, obs)
    full_KW1F = (a_KGWC @ w_KGCF).sum(1)[:, :, None]
    ww_KCGG = torch.einsum("kgcf,khcf->kcgh", w_KGCF, w_KGCF)
    alive_KC = torch.ones(K, C, dtype=torch.bool, device=obs.k.device)
    column_C = torch.arange(C, device=obs.k.device)
    tiny = torch.finfo(obs.dtype).tiny
    order = []
    for _ in range(removable):
        held_KGWC = a_KGWC * alive_KC[:, None, None]
        held_KGWC = held_KGWC / held_KGWC.sum(-1, keepdim=True).clamp_min(tiny)
        top_KGWC = held_KGWC.argmax(-1, keepdim=True) == column_C
        others_KGWC = held_KGWC.masked_fill(top_KGWC, 0)
        o_KWGF = (held_KGWC @ w_KGCF).transpose(1, 2)
        rest_KGW1 = others_KGWC.sum(-1, keepdim=True).clamp_min(tiny)
        r_KWGF = (others_KGWC / rest_KGW1 @ w_KGCF).transpose(1, 2)
        odds_KWCG = rearrange(others_KGWC / (1 - others_KGWC), "K G W C -> K W C G")
        top_KWCG = rearrange(top_KGWC.to(obs.dtype), "K G W C -> K W C G")

        y_KWYF = torch.cat([o_KWGF, r_KWGF, o_KWGF.sum(2, keepdim=True) - full_KW1F], 2)
        of_y_KWCY = torch.cat([odds_KWCG - top_KWCG, top_KWCG, torch.ones_like(top_KWCG[..., :1])], -1)
        yw_KWYGC = torch.einsum("kwyf,kgcf->kwygc", y_KWYF, w_KGCF)
        square_KC = (
            torch.einsum("kwcy,kwyz,kwcz->kc", of_y_KWCY, y_KWYF @ y_KWYF.mT, of_y_KWCY)
            - 2 * torch.einsum("kwcy,kwygc,kwcg->kc", of_y_KWCY, yw_KWYGC, odds_KWCG)
            + torch.einsum("kwcg,kcgh,kwch->kc", odds_KWCG, ww_KCGG, odds_KWCG)
        )
        gone_K1 = square_KC.masked_fill(~alive_KC | (column_C >= removable), torch.inf).argmin(-1, keepdim=True)
        order.append(gone_K1)
        alive_KC = alive_KC.scatter(1, gone_K1, False)
    return torch.cat(order, 1) if order else torch.zeros(K, 0, dtype=torch.long, device=obs.k.device)


def _values_after_projection(lm: LM, obs: Observation) -> Tensor:
    """[K, G, C, F]: every value as query head g of its group projects it, in coordinates of the group's own outputs.

    W_O of a group is Q R with orthonormal columns in Q, so that lengths after R are lengths after W_O, at a width of G * D.
    """
    K, G = obs.k.shape[1], obs.group
    w_KEX = rearrange(lm.model.blocks[obs.layer].output_weight().double(), "E (K G) D -> K E (G D)", K=K)
    r_KFGD = rearrange(torch.linalg.qr(w_KEX).R, "K F (G D) -> K F G D", G=G)
    return torch.einsum("kfgd,kcd->kgcf", r_KFGD, obs.v[0])

"""Refit what is kept: a bias and a new value for every kept entry, fitted so that attention to what is kept gives a layer's
queries what attention to everything gave them (Attention Matching, arXiv 2602.16284).

Of one KV head, with reference queries q of weights u_q, and with A_qn = exp(s_qn - z_q) an entry's share of the attention that
the whole prompt got (z_q: its log-sum-exp) and o_q the prompt's output:

    biases   w >= 0 that minimise  sum_q u_q^2 (sum_n A_qn w_n - 1)^2,  b_n = log w_n: the kept entries get the whole mass
    values   v' that minimise      sum_q u_q^2 |sum_n P_qn v'_n - o_q|^2 + ridge |v' - v|^2,  P_qn = A_qn w_n / sum_m A_qm w_m

It needs the kept entries, the queries, z_q and o_q, so that nothing else has to wait while layers compete for one budget.
u_q is the root of the share of q's attention that the prompt gets: what a query pays to its own text need not be matched.

Letters: H query heads, K KV heads, G = H / K, C entries of one head (columns), n kept entries (of one head, or of all heads, head
after head), m reference queries per query head, M = G * m those of a group, T tokens read after a prompt, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from restkv.observe import Observation
from restkv.probes import WINDOW
from restkv.seen import Seen

REFITS = ("none", "values", "bias", "both")
QUERIES = 640  # of a KV head's group, as in the trials
STEPS = 120  # of the accelerated gradient descent
RIDGE = 0.1  # of the mean square that an entry's weights have
FARTHEST = 8.0  # a bias is at most so far from 0: attention times 3,000, or a 3,000th of it


class References(NamedTuple):
    """Queries of one layer that a refit serves, and what they got from all entries.

    kind: "values", "bias" or "both". at: an observation with these queries, of no entries. stop_m: a query counts for entries
    before this position. lse_Hm: log-sum-exp of its logits over those. out_HmD: their output. weight_Hm: u_q. All in at.dtype.
    """

    kind: str
    at: Observation
    stop_m: Tensor
    lse_Hm: Tensor
    out_HmD: Tensor
    weight_Hm: Tensor


def references(kind: str, obs: Observation, seen: Sequence[Seen], probe: str) -> References | None:
    """Those of a prompt's layer: of every probe as many as of any other, and of every text that it has read as many as of its
    others, as far as it has them.

    Args:
        kind: of REFITS; with "none" there are none.
        obs: the layer's entries, of one row, and its last queries.
        seen: what the probe observes besides the window.
    """
    if kind == "none":
        return None
    length, device = obs.pos.shape[-1], obs.pos.device
    parts = list(seen)
    if not seen or WINDOW in probe.split("+") or any(one.newest for one in seen):
        parts.append(Seen(obs.q[0], length - obs.q.shape[2], probe=WINDOW))
    counts = _counts(QUERIES // obs.group, parts)
    queries, positions, stops, own = [], [], [], []
    for part, count in zip(parts, counts, strict=True):
        at_m = torch.linspace(0, part.q_HQD.shape[1] - 1, count, device=device).round().long()
        q_HmD, pos_m = part.q_HQD[:, at_m], part.positions_Q()[at_m]
        queries.append(q_HmD)
        positions.append(pos_m)
        stops.append(pos_m - part.gap if part.gap else pos_m + 1)
        own.append(_own_lse(obs, part, q_HmD, pos_m))
    q_1HmD, pos_1m = torch.cat(queries, 1)[None], torch.cat(positions)[None]
    stop_m, own_Hm = torch.cat(stops), torch.cat(own, 1)
    view = replace(obs, q=q_1HmD, q_pos=pos_1m, keep=None, mass=None, looks=(), protected=None)
    lse_Hm, weight_Hm = torch.zeros_like(own_Hm), torch.zeros_like(own_Hm)
    out_HmD = own_Hm.new_zeros(*own_Hm.shape, obs.v.shape[-1])
    for rows in view.rows():
        kv = slice(rows.heads.start // obs.group, rows.heads.stop // obs.group)
        logits_KGmC = rearrange(rows.logits_BHWC, "1 (K G) m C -> K G m C", G=obs.group)
        all_KGm = torch.logaddexp(
            logits_KGmC.logsumexp(-1), rearrange(own_Hm[rows.heads, rows.queries], "(K G) m -> K G m", G=obs.group)
        )
        late_K1mC = obs.pos[0, kv, None, None] >= stop_m[rows.queries, None]
        logits_KGmC = logits_KGmC.masked_fill(late_K1mC, -torch.inf)
        lse_KGm = logits_KGmC.logsumexp(-1)
        blind_KGm = lse_KGm == -torch.inf
        lse_KGm = lse_KGm.masked_fill(blind_KGm, 0)
        a_KGmC = (logits_KGmC - lse_KGm[..., None]).exp()
        o_KGmD = rearrange(
            rearrange(a_KGmC, "K G m C -> K (G m) C") @ obs.v[0, kv].to(obs.dtype), "K (G m) D -> K G m D", G=obs.group
        )
        where = rows.heads, rows.queries
        lse_Hm[where], out_HmD[where] = lse_KGm.flatten(0, 1), o_KGmD.flatten(0, 1)
        share_KGm = (lse_KGm - all_KGm).exp().masked_fill(blind_KGm, 0)
        weight_Hm[where] = share_KGm.sqrt().flatten(0, 1)
        del logits_KGmC, a_KGmC, late_K1mC  # not alive beside the next piece
    # Parts of the entries, empty ones too, would keep all of them alive until the last layer has been read.
    at = replace(view, k=obs.k.new_empty(0), v=obs.v.new_empty(0), pos=obs.pos.new_empty(0))
    return References(kind, at, stop_m, lse_Hm, out_HmD, weight_Hm)


def _counts(total: int, parts: Sequence[Seen]) -> list[int]:
    """How many queries to take of every part. Ten questions are one probe: they are not to leave a replay next to nothing."""
    probes: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        probes.setdefault(part.probe, []).append(index)
    sizes = {probe: [parts[index].q_HQD.shape[1] for index in indices] for probe, indices in probes.items()}
    shares = _shared_out(total, [sum(some) for some in sizes.values()])
    counts = [0] * len(parts)
    for (probe, indices), share in zip(probes.items(), shares, strict=True):
        for index, count in zip(indices, _shared_out(share, sizes[probe]), strict=True):
            counts[index] = count
    return counts


def _shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """So many for each, at most `total` in all and at most its size: what one cannot use goes to the others."""
    given, left = [0] * len(sizes), total
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        given[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= given[index]
    return given


def _own_lse(obs: Observation, part: Seen, q_HmD: Tensor, pos_m: Tensor) -> Tensor:
    """[H, m]: log-sum-exp of the queries' logits over the entries that were read with them; -inf where there are none."""
    lse_Hm = torch.full(q_HmD.shape[:2], -torch.inf, dtype=obs.dtype, device=q_HmD.device)
    if part.k_KTD is None or part.v_KTD is None or not len(pos_m):
        return lse_Hm
    length = obs.pos.shape[-1]
    own_KT = torch.arange(length, length + part.k_KTD.shape[1], device=pos_m.device).expand(len(part.k_KTD), -1)
    k, v, pos = part.k_KTD[None], part.v_KTD[None], own_KT[None]
    view = replace(obs, q=q_HmD[None], q_pos=pos_m[None], k=k, v=v, pos=pos, keep=None)
    for rows in view.rows():
        lse_Hm[rows.heads, rows.queries] = rows.logits_BHWC[0].logsumexp(-1)
    return lse_Hm


def refit(
    of: References | None, keep_KL: Tensor, k_nD: Tensor, v_nD: Tensor, pos_n: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the entries that a layer keeps, head after head: new values [n, D] like v_nD, and as companions biases [n] float32.

    On its own queries a head's error never grows: what would not lower it is not done. Without references nothing changes.

    Args:
        keep_KL: bool, which they are of every head.
        k_nD, v_nD, pos_n: their keys after RoPE, values and positions.
    """
    if of is None:
        return v_nD, {}
    counts_K = keep_KL.sum(-1).tolist()  # sync: once per layer of a prompt
    values, biases, G = [], [], of.at.q.shape[1] // len(counts_K)
    parts = zip(*(x.split(counts_K) for x in (k_nD, v_nD, pos_n)), strict=True)
    for head, (k_cD, v_cD, pos_c) in enumerate(parts):
        group = slice(head * G, (head + 1) * G)
        view = replace(of.at, q=of.at.q[:, group], k=k_cD[None, None], v=v_cD[None, None], pos=pos_c[None, None])
        logits_GmC = view.logits()[0].masked_fill(pos_c >= of.stop_m[:, None], -torch.inf)
        share_Mc = (logits_GmC - of.lse_Hm[group, :, None]).exp().flatten(0, 1)
        out_MD, weight_M = of.out_HmD[group].flatten(0, 1), of.weight_Hm[group].flatten()
        new_cD, bias_c = refit_head(of.kind, share_Mc, v_cD.to(share_Mc.dtype), out_MD, weight_M)
        values.append(new_cD.to(v_nD.dtype))
        biases.append(bias_c.float())
    return torch.cat(values), {"bias": torch.cat(biases)}


def refit_head(kind: str, share_Mn: Tensor, v_nD: Tensor, out_MD: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """refit of one head: values [n, D] and biases [n] in the arguments' dtype.

    Args:
        share_Mn: A, of the kept entries.
        v_nD: their values. out_MD: o. weight_M: u.
    """
    nothing_n = v_nD.new_zeros(len(v_nD))
    if not len(v_nD) or not len(out_MD):
        return v_nD, nothing_n
    tries = [(nothing_n, v_nD)]
    biases = [_biases(share_Mn, weight_M)] if kind in ("bias", "both") else []
    for bias_n in biases if kind == "bias" else [nothing_n, *biases]:
        tries.append((bias_n, v_nD if kind == "bias" else _values(share_Mn, bias_n, v_nD, out_MD, weight_M)))
    errors = torch.stack([_error(share_Mn, bias, v, out_MD, weight_M) for bias, v in tries])
    bias_n, new_nD = tries[int(errors.argmin())]  # sync: once per head of a prompt
    return new_nD, bias_n


def _attention(share_Mn: Tensor, bias_n: Tensor) -> Tensor:
    """P: softmax weights over the kept entries; 0 for a query that sees none of them."""
    weighted_Mn = share_Mn * bias_n.exp()
    return weighted_Mn / weighted_Mn.sum(-1, keepdim=True).clamp_min(torch.finfo(share_Mn.dtype).tiny)


def _error(share_Mn: Tensor, bias_n: Tensor, v_nD: Tensor, out_MD: Tensor, weight_M: Tensor) -> Tensor:
    return ((_attention(share_Mn, bias_n) @ v_nD - out_MD) * weight_M[:, None]).double().square().sum()


def _biases(share_Mn: Tensor, weight_M: Tensor) -> Tensor:
    """log w by accelerated projected gradient descent (FISTA) from w = 1."""
    a_Mn = share_Mn * weight_M[:, None]
    x_n = torch.ones_like(a_Mn[0])
    for _ in range(8):  # the largest eigenvalue of A^T A, from below
        x_n = a_Mn.mT @ (a_Mn @ x_n)
        x_n = x_n / torch.linalg.vector_norm(x_n).clamp_min(torch.finfo(x_n.dtype).tiny)
    step = 1 / (1.1 * torch.linalg.vector_norm(a_Mn @ x_n).square()).clamp_min(torch.finfo(x_n.dtype).tiny)
    w_n = y_n = torch.ones_like(x_n)
    t = 1.0
    for _ in range(STEPS):
        before_n, w_n = w_n, (y_n - step * (a_Mn.mT @ (a_Mn @ y_n - weight_M))).clamp_min(0)
        after = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y_n, t = w_n + (t - 1) / after * (w_n - before_n), after
    return w_n.log().clamp(-FARTHEST, FARTHEST)


def _values(share_Mn: Tensor, bias_n: Tensor, v_nD: Tensor, out_MD: Tensor, weight_M: Tensor) -> Tensor:
    """v', from normal equations of as many unknowns as there are queries or entries, whichever are fewer, in float64."""
    p_Mn = _attention(share_Mn, bias_n).double() * weight_M[:, None].double()
    miss_MD = out_MD.double() * weight_M[:, None].double() - p_Mn @ v_nD.double()
    ridge = RIDGE * p_Mn.square().sum() / p_Mn.shape[1]
    if not ridge > 0:  # sync: once per head of a prompt
        return v_nD
    wide = p_Mn.shape[0] < p_Mn.shape[1]
    square = p_Mn @ p_Mn.mT if wide else p_Mn.mT @ p_Mn
    square.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(square)
    change_nD = (
        p_Mn.mT @ torch.cholesky_solve(miss_MD, factor) if wide else torch.cholesky_solve(p_Mn.mT @ miss_MD, factor)
    )
    return (v_nD.double() + change_nD).to(v_nD.dtype)

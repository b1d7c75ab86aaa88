"""How much an entry's removal would change a layer's output for the query that would miss it most, over thousands of queries.

For one query of one head, with softmax weights A and output o = sum_n A_n v_n, entry n's removal moves the output by
A_n / (1 - A_n) * (o - v_n), exactly (equation 7 of ReST-KV). Whole rows of attention are made piece by piece, and the distances
||(o - v_n) R|| as one product of matrices: |o R|^2 - 2 (o R).(v_n R) + |v_n R|^2. What that loses to cancellation is up to 1e-3
of |o R| for an entry whose value is nearly the output itself, and so hardly changes it.

Letters: B batch rows, H query heads, K KV heads, G = H / K, C columns, w observed queries, D head dim, F coordinates of the
projected outputs (restkv.observe.root_of), f = F + 2; h and k are some of the heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from restkv.observe import Observation, Rows, first_column, nothing


def strongest_change(obs: Observation, relative: bool, also: Callable[[Rows], None] | None = None) -> Tensor:
    """max over the observed queries of A_n / (1 - A_n) * ||(o - v_n) W_O||: [B, H, C] in obs.dtype; 0 beyond the past.

    Args:
        obs: with the roots of W_O.
        relative: divide by the length of the query's residual stream (obs.stream), where it is known.
        also: called with every piece of the logits, over all columns, before it is used.
    """
    most_BHC, G = nothing(obs), obs.group
    past = _last_past(obs)
    projected = None  # heads, and their values: pieces of the same heads follow one another
    for rows in obs.rows(seen=also is None):
        if also is not None:
            also(rows)
        if projected is None or projected[0] != rows.heads:
            projected = rows.heads, *_projected(obs, rows.heads, past)
        _, v_BkCD, root_kGDF, y_BkGCf = projected
        # Each step writes over what the one before has made: with thousands of queries the time is that of memory.
        others_BkGwC = rearrange(rows.own_weights_BHWC(), "B (k G) w C -> B k G w C", G=G)
        top_a_BkGw1, top_BkGw1 = others_BkGwC.max(-1, keepdim=True)
        # Without the top entry: its own removal is a * (rest - v), which 1 - a would round to nothing.
        others_BkGwC.scatter_(-1, top_BkGw1, 0)
        mass_BkGw1 = others_BkGwC.sum(-1, keepdim=True)
        seen = others_BkGwC.shape[-1]
        sum_BkGwD = rearrange(
            rearrange(others_BkGwC, "B k G w C -> B k (G w) C") @ v_BkCD[:, :, :seen],
            "B k (G w) D -> B k G w D",
            G=G,
        )
        at_BkwD = rearrange(top_BkGw1, "B k G w 1 -> B k (G w) 1").expand(-1, -1, -1, v_BkCD.shape[-1])
        top_v_BkGwD = rearrange(v_BkCD.gather(2, at_BkwD), "B k (G w) D -> B k G w D", G=G)
        rest_BkGwD = sum_BkGwD / mass_BkGw1.clamp_min(torch.finfo(obs.dtype).tiny)
        o_BkGwF = (sum_BkGwD + top_a_BkGw1 * top_v_BkGwD) @ root_kGDF
        top_move_BkGwF = (rest_BkGwD - top_v_BkGwD) @ root_kGDF
        top_change_BkGw1 = top_a_BkGw1 * torch.linalg.vector_norm(top_move_BkGwF, dim=-1, keepdim=True)
        shrink_BkGw1 = _shrink(obs, rows, relative)
        compared = slice(0, min(seen, past))
        others_BkGwC = others_BkGwC[..., compared]
        x_BkGwf = torch.cat([o_BkGwF.square().sum(-1, keepdim=True), torch.ones_like(mass_BkGw1), -2 * o_BkGwF], -1)
        # The square of the distance, times that of the shrinking.
        change_BkGwC = (x_BkGwf * shrink_BkGw1.square()) @ y_BkGCf[..., compared, :].mT
        change_BkGwC.clamp_min_(0).sqrt_().mul_(others_BkGwC).div_(others_BkGwC.neg_().add_(1))
        # A top entry that is not compared leaves the last one as it is.
        at_BkGw1 = top_BkGw1.clamp_max(compared.stop - 1)
        there_BkGw1 = change_BkGwC.gather(-1, at_BkGw1)
        change_BkGwC.scatter_(-1, at_BkGw1, (top_change_BkGw1 * shrink_BkGw1).where(top_BkGw1 == at_BkGw1, there_BkGw1))
        change_BHwC = rows.counting(rearrange(change_BkGwC, "B k G w C -> B (k G) w C"))
        most_BHC[:, rows.heads, compared] = torch.maximum(most_BHC[:, rows.heads, compared], change_BHwC.amax(2))
    return most_BHC


def _last_past(obs: Observation) -> int:
    """How many of the first columns there are until the last one that is compared (Observation.past), at least 1."""
    if obs.pos.device.type != "cpu" or torch.compiler.is_compiling():
        return obs.pos.shape[-1]  # asking would wait for the device
    return first_column(~obs.past, every=True)


def _shrink(obs: Observation, rows: Rows, relative: bool) -> Tensor:
    """What these queries' changes are multiplied with, [B, 1, 1, w, 1]; 0 for queries that are none."""
    there_Bw = obs.q_pos[:, rows.queries] >= 0
    shrink_Bw = torch.ones_like(there_Bw, dtype=obs.dtype)
    if relative and obs.stream is not None:
        shrink_Bw = 1 / obs.stream[:, rows.queries].to(obs.dtype)
    return rearrange(shrink_Bw.where(there_Bw, 0), "B w -> B 1 1 w 1")


def _projected(obs: Observation, heads_h: slice, past: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of some query heads' groups: values [B, k, C, D], roots [k, G, D, F], and of the first columns the values as every head
    projects them after 1 and the square of their length, [B, k, G, C, 2 + F].
    """
    assert obs.root is not None, "this needs the roots of W_O (Policy.needs)"
    heads_k = slice(heads_h.start // obs.group, heads_h.stop // obs.group)
    v_BkCD = obs.v[:, heads_k].to(obs.dtype)
    root_kGDF = rearrange(obs.root[heads_h].to(obs.dtype), "(k G) D F -> k G D F", G=obs.group)
    v_BkGCF = v_BkCD[:, :, None, :past] @ root_kGDF
    square_BkGC1 = v_BkGCF.square().sum(-1, keepdim=True)
    return v_BkCD, root_kGDF, torch.cat([torch.ones_like(square_BkGC1), square_BkGC1, v_BkGCF], -1)

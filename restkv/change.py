"""How much an entry's removal would change a layer's output for the query that would miss it most, over thousands of queries.

For one query of one head, with softmax weights A and output o = sum_n A_n v_n, entry n's removal moves the output by
A_n / (1 - A_n) * (o - v_n), exactly (equation 7 of ReST-KV). Whole rows of attention are made piece by piece, and the distances
||(o - v_n) R|| as a product of matrices: |o R|^2 - 2 (o R).(v_n R) + |v_n R|^2. What that loses to cancellation is up to 1e-3 of
|o R| for an entry whose value is nearly the output itself, and so hardly changes it.

Letters: B batch rows, H query heads, K KV heads, G = H / K, C columns, w observed queries, D head dim, F coordinates of the
projected outputs (restkv.observe.root_of); h and k are some of the heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from restkv.observe import Observation, Rows, nothing


def strongest_change(obs: Observation, relative: bool, also: Callable[[Rows], None] | None = None) -> Tensor:
    """max over the observed queries of A_n / (1 - A_n) * ||(o - v_n) W_O||: [B, H, C] in obs.dtype.

    Args:
        obs: with the roots of W_O.
        relative: divide by the length of the query's residual stream (obs.stream), where it is known.
        also: called with every piece of the logits before it is used.
    """
    most_BHC, G, dtype = nothing(obs), obs.group, obs.dtype
    projected = None  # heads, and their values: pieces of the same heads follow one another
    for rows in obs.rows():
        if also is not None:
            also(rows)
        if projected is None or projected[0] != rows.heads:
            projected = rows.heads, *_projected(obs, rows.heads)
        _, v_BkCD, root_kGDF, v_BkGCF, square_BkG1C = projected
        a_BkGwC = rearrange(rows.weights_BHWC(), "B (k G) w C -> B k G w C", G=G)
        top_BkGw1 = a_BkGwC.argmax(-1, keepdim=True)
        top_a_BkGw1 = a_BkGwC.gather(-1, top_BkGw1)
        # Without the top entry: its own removal is a * (rest - v), which 1 - a would round to nothing.
        others_BkGwC = a_BkGwC.scatter(-1, top_BkGw1, 0)
        mass_BkGw1 = others_BkGwC.sum(-1, keepdim=True)
        sum_BkGwD = rearrange(
            rearrange(others_BkGwC, "B k G w C -> B k (G w) C") @ v_BkCD, "B k (G w) D -> B k G w D", G=G
        )
        at_BkwD = rearrange(top_BkGw1, "B k G w 1 -> B k (G w) 1").expand(-1, -1, -1, v_BkCD.shape[-1])
        top_v_BkGwD = rearrange(v_BkCD.gather(2, at_BkwD), "B k (G w) D -> B k G w D", G=G)
        rest_BkGwD = sum_BkGwD / mass_BkGw1.clamp_min(torch.finfo(dtype).tiny)
        o_BkGwF = (sum_BkGwD + top_a_BkGw1 * top_v_BkGwD) @ root_kGDF
        square_BkGwC = torch.baddbmm(
            square_BkG1C.flatten(0, 2), o_BkGwF.flatten(0, 2), v_BkGCF.flatten(0, 2).mT, alpha=-2
        ).view_as(a_BkGwC)
        length_BkGwC = square_BkGwC.add_(o_BkGwF.square().sum(-1, keepdim=True)).clamp_min_(0).sqrt_()
        change_BkGwC = length_BkGwC.mul_(a_BkGwC).div_(1 - a_BkGwC)
        top_move_BkGwF = (rest_BkGwD - top_v_BkGwD) @ root_kGDF
        top_length_BkGw1 = torch.linalg.vector_norm(top_move_BkGwF, dim=-1, keepdim=True)
        change_BkGwC.scatter_(-1, top_BkGw1, top_a_BkGw1 * top_length_BkGw1)
        if relative and obs.stream is not None:
            change_BkGwC /= obs.stream[:, None, None, rows.queries, None].to(dtype)
        change_BHwC = rearrange(change_BkGwC, "B k G w C -> B (k G) w C")
        if rows.near_BHWC is not None:
            change_BHwC = change_BHwC.masked_fill(rows.near_BHWC, 0)
        most_BHC[:, rows.heads] = torch.maximum(most_BHC[:, rows.heads], change_BHwC.amax(2))
    return most_BHC


def _projected(obs: Observation, heads_h: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some query heads' groups: values [B, k, C, D], roots [k, G, D, F], values as every head projects them [B, k, G, C, F],
    and the squares of their lengths [B, k, G, 1, C].
    """
    assert obs.root is not None, "this needs the roots of W_O (Policy.needs)"
    heads_k = slice(heads_h.start // obs.group, heads_h.stop // obs.group)
    v_BkCD = obs.v[:, heads_k].to(obs.dtype)
    root_kGDF = rearrange(obs.root[heads_h].to(obs.dtype), "(k G) D F -> k G D F", G=obs.group)
    v_BkGCF = v_BkCD[:, :, None] @ root_kGDF
    return v_BkCD, root_kGDF, v_BkGCF, v_BkGCF.square().sum(-1)[..., None, :]

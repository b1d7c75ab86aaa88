"""Attention outputs of a layer with entries missing: what eviction does to it, before errors of other layers add up.

Everything is made of what a full pass leaves behind (queries, keys, values), outside of the model and in float64.

Letters: L tokens, W observed queries, C columns, H query heads, K KV heads, G = H / K, D head dim, E hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling.forward import dense_layer
from restkv.lm import LM
from restkv.observe import Observation
from restkv.reading import embed


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a full pass: the queries of the last W tokens, and the keys and values of all, after RoPE."""

    q_HWD: Tensor
    k_KLD: Tensor
    v_KLD: Tensor


@torch.no_grad()
def full_pass(lm: LM, ids: Sequence[int], last: int) -> tuple[Tensor, list[LayerTrace]]:
    """Logits [W, V] float32 of the last W tokens with the full cache, and every layer's trace of them."""
    x_LE, rotary = embed(lm.model, ids)
    layers = []
    for block in lm.model.blocks:
        q_HWD, k_KLD, v_KLD, _ = dense_layer(lm.model, block, x_LE, rotary, last)
        layers.append(LayerTrace(q_HWD, k_KLD, v_KLD))
    return lm.model.head(x_LE[-last:]), layers


def observation(lm: LM, index: int, trace: LayerTrace, stop: int, queries: int | None = None) -> Observation:
    """Columns 0 ... stop-1 of a layer, and its last queries before `stop` (all that were traced, if not said)."""
    length = trace.k_KLD.shape[1]
    last = trace.q_HWD[:, : trace.q_HWD.shape[1] - (length - stop)]
    last = last if queries is None else last[:, -queries:]
    config, device = lm.config, trace.k_KLD.device
    position_C = torch.arange(stop, device=device)
    return Observation(
        q=last[None].double(),
        q_pos=position_C[None, stop - last.shape[1] :],
        k=trace.k_KLD[None, :, :stop].double(),
        v=trace.v_KLD[None, :, :stop].double(),
        pos=position_C.expand(1, len(trace.k_KLD), -1),
        root=None,
        softmax_scale=config.attn_scale,
        softcap=config.attn_softcap,
        sliding_window=lm.model.blocks[index].window,
        layer=index,
        num_layers=config.num_layers,
    )


def relative_error(lm: LM, obs: Observation, keep_HC: Tensor) -> float:
    """||O - O_full|| / ||O_full|| when query head h sees only the columns of keep[h]; float64."""
    full_WE, part_WE = (attention_output(lm, some) for some in (obs, replace(obs, keep=keep_HC[None])))
    return float((part_WE - full_WE).norm() / full_WE.norm())


def tail_error(lm: LM, obs: Observation, keep_HP: Tensor) -> float:
    """relative_error where all columns after those of keep[h] are seen."""
    tail_HT = keep_HP.new_ones(len(keep_HP), obs.k.shape[2] - keep_HP.shape[1])
    return relative_error(lm, obs, torch.cat([keep_HP, tail_HT], 1))


def tail_errors(lm: LM, obs: Observation, keeps: Sequence[Tensor]) -> list[float]:
    """tail_error of several sets; what they are all compared with is made once."""
    logits_HWC = obs.logits()[0]
    full_HWD = _heads_output(obs, logits_HWC)
    length, errors = _projected(lm, obs, full_HWD).norm(), []
    for keep_HP in keeps:
        gone_HP = ~keep_HP
        if not gone_HP.any():
            errors.append(0.0)
            continue
        part_HWC = logits_HWC.clone()
        part_HWC[..., : gone_HP.shape[1]].masked_fill_(gone_HP[:, None], -torch.inf)
        errors.append(float(_projected(lm, obs, _heads_output(obs, part_HWC) - full_HWD).norm() / length))
    return errors


def attention_output(lm: LM, obs: Observation) -> Tensor:
    """The layer's attention output [W, E] for the observed queries, after W_O, float64."""
    return _projected(lm, obs, _heads_output(obs, obs.logits()[0]))


def _heads_output(obs: Observation, logits_HWC: Tensor) -> Tensor:
    """[H, W, D], before W_O; zeros for a query that sees nothing."""
    a_HWC = logits_HWC.softmax(-1).nan_to_num_(0)
    v_KCD = obs.v[0]
    return (a_HWC.reshape(len(v_KCD), -1, a_HWC.shape[-1]) @ v_KCD).view(*a_HWC.shape[:2], -1)


def _projected(lm: LM, obs: Observation, o_HWD: Tensor) -> Tensor:
    return torch.einsum("hwd,ehd->we", o_HWD, lm.model.blocks[obs.layer].output_weight().double())

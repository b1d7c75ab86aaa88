"""One prompt, many caches: a dense prefill does not depend on what is evicted after it, so that policies can share it.

Letters: L prompt length, E hidden width, H query heads, K KV heads, D head dim, W queries, T new tokens, X = K or H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.forward import dense_layer
from modeling.layers import Decoder
from restkv.generate import Session
from restkv.lm import LM


@torch.no_grad()
def prefill_together(lm: LM, sessions: Sequence[Session], ids: Sequence[int]) -> None:
    """Session.prefill([ids]) of several new one-row sessions, at the price of one pass through the model."""
    rows = [(session.cache.row(0), session.evictor.row(0)) for session in sessions]
    policies = [evictor.policy for _, evictor in rows]
    last = max(max(policy.observed_prompt, cache.window) for policy, (cache, _) in zip(policies, rows, strict=True))
    slots = any(policy.slot_positions for policy in policies)
    x_LE, rotary = embed_prompt(lm.model, ids)
    for index, block in enumerate(lm.model.blocks):
        # Accumulated attention is the same for all policies that want it, per KV head or per query head.
        masses = {
            policy.granularity: evictor.watch_prompt(index, len(ids))
            for policy, (_, evictor) in zip(policies, rows, strict=True)
            if "mass" in policy.needs
        }
        watches = [watch for watch, _ in masses.values() if watch is not None]

        def watch_all(q_THD: Tensor, k_KCD: Tensor, start: int, watches: list = watches) -> None:
            for watch in watches:
                watch(q_THD, k_KCD, start)

        q_HWD, k_KLD, v_KLD, raw_KLD = dense_layer(
            lm.model, block, x_LE, rotary, last, watch=watch_all if watches else None, raw=slots
        )
        for policy, (cache, evictor) in zip(policies, rows, strict=True):
            mass_XL = masses[policy.granularity][1] if "mass" in policy.needs else None
            raw = raw_KLD if policy.slot_positions else None
            evictor.store_prompt(cache, index, q_HWD, k_KLD, v_KLD, raw, mass_XL)
    logits_1V = lm.model.head(x_LE[-1:])
    for session, (cache, evictor) in zip(sessions, rows, strict=True):
        evictor.prompt_done(cache, len(ids))
        session.cache.refresh()
        session.logits_BV = logits_1V


def embed_prompt(model: Decoder, ids: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Residual stream [L, E], which dense_layer updates in place, and the rotations of all positions."""
    ids_1L = torch.tensor([list(ids)], device=model.device)
    pos_1L = torch.arange(len(ids), dtype=torch.int32, device=model.device)[None]
    return model.embed(ids_1L)[0].clone(), model.rotary(pos_1L, pos_1L.amax(-1) + 1)

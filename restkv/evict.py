"""Eviction: observe, score, select; the survivors of a prompt go into pages, the losers of a decode interval leave theirs.

Letters: B batch rows, H query heads, K KV heads, G = H / K, C entries (columns) of one head, D head dim, W observed queries,
R = B*K page lists, X = K or H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.layers import Decoder
from modeling.pages import KVCache
from restkv.errors import PolicyError
from restkv.observe import Observation, cross_gram_of, gram_of
from restkv.policies.base import Policy


class Grams:
    """W_O^h^T W_O^h of every layer, computed on first use and kept (float32; D*D numbers per query head)."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._made: dict[tuple[int, str], Tensor] = {}

    def get(self, layer: int, needs: frozenset[str]) -> Tensor | None:
        """[H, D, D] for policies that need "gram", [K, G, D, G, D] for "cross_gram", else None."""
        kind = next((name for name in ("cross_gram", "gram") if name in needs), None)
        if kind is None:
            return None
        if (layer, kind) not in self._made:
            w_o_EHD = self._model.blocks[layer].output_weight()
            gram = gram_of(w_o_EHD) if kind == "gram" else cross_gram_of(w_o_EHD, self._model.config.num_kv_heads)
            self._made[layer, kind] = gram
        return self._made[layer, kind]


def protected_entries(policy: Policy, pos_BKC: Tensor, next_pos_B: Tensor) -> Tensor:
    """Bool [B, K, C]: sinks, the observation window and the user's spans, which no score can evict."""
    recent_BKC = pos_BKC >= (next_pos_B - policy.window)[:, None, None]
    kept_BKC = recent_BKC | (pos_BKC < policy.sinks)
    for start, end in policy.protect:
        kept_BKC = kept_BKC | ((pos_BKC >= start) & (pos_BKC < end))
    return kept_BKC & (pos_BKC >= 0)


def check_protected(policy: Policy, length: int, budget: int) -> None:
    """Refuse spans that leave the budget no room: what is protected must fit into it."""
    positions = set(range(min(policy.sinks, length))) | set(range(max(0, length - policy.window), length))
    for start, end in policy.protect:
        positions |= set(range(min(start, length), min(end, length)))
    if len(positions) > budget < length:
        raise PolicyError(
            f"budget {budget} is smaller than the {len(positions)} protected entries (sinks, window and --protect spans); "
            "raise the budget or protect less"
        )


def choose(policy: Policy, obs: Observation) -> tuple[Tensor, dict[str, Tensor]]:
    """Which entries stay: keep [B, K, C] bool and the companions to store with them (name -> [B, K, C, ...])."""
    B, K, C = obs.pos.shape
    keep_BXC = policy.keep(obs)
    X = keep_BXC.shape[1]
    if policy.granularity == "kv":
        return keep_BXC, {}
    keep_BKGC = keep_BXC.view(B, K, X // K, C)
    return keep_BKGC.any(2), {"keep": keep_BKGC.transpose(2, 3)}


def evict_prompt(
    model: Decoder,
    cache: KVCache,
    row: int,
    layer: int,
    policy: Policy,
    grams: Grams,
    budget: int,
    q_HWD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
) -> None:
    """Score one layer's prompt, write the survivors into the row's pages, remember the window's queries."""
    heads, length, _ = k_KLD.shape
    pos_KL = torch.arange(length, device=k_KLD.device).expand(heads, length)
    keep_KL: Tensor | None = None
    companions: dict[str, Tensor] = {}
    if budget < length:
        window = q_HWD.shape[1]
        budget_1 = torch.tensor([budget], device=k_KLD.device)
        obs = _observation(
            model,
            policy,
            grams,
            layer,
            q=q_HWD[None],
            q_pos=torch.arange(length - window, length, device=k_KLD.device)[None],
            k=k_KLD[None],
            v=v_KLD[None],
            pos=pos_KL[None],
            budgets_B=budget_1,
            next_pos_B=torch.tensor([length], device=k_KLD.device),
        )
        keep_1KL, companions = choose(policy, obs)
        keep_KL = keep_1KL[0]
        companions = {name: data[0] for name, data in companions.items()}
    cache.layers[layer].append(row, k_KLD, v_KLD, pos_KL, keep_KL, companions)
    if cache.window:
        cache.remember(layer, row, q_HWD[:, -cache.window :], length - 1)


def evict(model: Decoder, cache: KVCache, policy: Policy, grams: Grams, budgets: Sequence[int]) -> bool:
    """Bring every head of every row back to its row's budget and compact; True if anything was evicted.

    Args:
        budgets: entries per KV head (per query head for granularity "query") of each row.
    """
    device = cache.next_pos.device
    budgets_B = torch.tensor(budgets, device=device)
    evicted = False
    for index, layer in enumerate(cache.layers):
        rows, heads = layer.rows, layer.heads
        if all(n <= budgets[i // heads] for i, n in enumerate(layer.lengths())):
            continue
        slot_RC, pos_RC = layer.slots()
        columns = slot_RC.shape[1]
        pool = layer.pool
        shape = (rows, heads, columns)
        keep_SG = pool.companions.get("keep")
        q_BHWD, q_pos_BW = cache.recent(index)
        obs = _observation(
            model,
            policy,
            grams,
            index,
            q=q_BHWD,
            q_pos=q_pos_BW,
            k=pool.k[0, 0, slot_RC].view(*shape, -1),
            v=pool.v[0, 0, slot_RC].view(*shape, -1),
            pos=pos_RC.view(shape).long(),
            keep=None if keep_SG is None else keep_SG[slot_RC].view(*shape, -1).transpose(2, 3).flatten(1, 2),
            budgets_B=budgets_B,
            next_pos_B=cache.next_pos,
        )
        keep_BKC, companions = choose(policy, obs)
        layer.compact(keep_BKC.flatten(0, 1), {name: data.flatten(0, 1) for name, data in companions.items()})
        evicted = True
    return evicted


def _observation(
    model: Decoder,
    policy: Policy,
    grams: Grams,
    layer: int,
    *,
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    budgets_B: Tensor,
    next_pos_B: Tensor,
    keep: Tensor | None = None,
) -> Observation:
    config = model.config
    return Observation(
        q=q,
        q_pos=q_pos,
        k=k,
        v=v,
        pos=pos,
        gram=grams.get(layer, policy.needs),
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        window=model.blocks[layer].window,
        layer=layer,
        num_layers=config.num_layers,
        keep=keep,
        protected=protected_entries(policy, pos, next_pos_B),
        budget_B=budgets_B,
    )

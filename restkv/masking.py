"""An eviction as one graph: from the entries of all layers to the masks that the next step reads (docs/architecture.md).

Every layer's entries are gathered at a fixed shape and ranked; an allocation chooses; the losers lose their position, and pages
on which nothing is left leave the list that attention reads. No shape depends on what is chosen and nothing is asked of the
device, so torch.compile makes one graph of it, layers of a kind being one region. Run as it is, it computes the same.

Letters: B batch rows, H query heads, K KV heads, G = H / K, R = B*K page lists, M pages of the longest, C = columns of a list's
pages, D head dim, S slots, W remembered queries, N layers, X heads with a kept set of their own (KV heads, or query heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling.pages import LayerCache, columns, listed_pages, recent
from modeling.pool import EMPTY, read
from modeling.ranks import ALONE, Ranks
from modeling.rope import Rotary
from restkv.budgets import Allocation, Global
from restkv.observe import Observation, weighted_attention
from restkv.policies.base import Policy
from restkv.protection import protected


@dataclass(frozen=True)
class Shape:
    """Numbers that all layers share, constants of a graph.

    Args:
        heads: K.
        page: slots of a page.
        pages: of every list to look at, C / page.
        ring_size: W.
        softmax_scale, softcap, num_layers, budgets, ranks: see Observation; budgets is None where layers differ.
    """

    heads: int
    page: int
    pages: int
    ring_size: int
    softmax_scale: float
    softcap: float | None
    num_layers: int
    budgets: tuple[int, ...] | None
    ranks: Ranks = ALONE


class Entries(NamedTuple):
    """What an eviction reads and writes of one layer: tensors, which a graph takes as inputs (and Rotary, which holds some).

    k, v [S,D]; pos [S] int32; table, listed [R,M] and used, skipped [R] int32: see LayerView and LayerCache. keep [S,G] bool,
    mass [S,1 or G] and bias [S] float32: companions, or None. ring [B*(W+1),H,D]. root: see Observation. reach [1] int32: the
    sliding window, or None; number 0-d: which layer it is (where nothing is compiled both are plain numbers). budget_B int64.
    newest_B int64: how many of the newest entries are protected.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    table: Tensor
    used: Tensor
    listed: Tensor
    skipped: Tensor
    keep: Tensor | None
    mass: Tensor | None
    bias: Tensor | None
    ring: Tensor
    root: Tensor | None
    reach: int | Tensor | None
    rotary: Rotary | None
    number: int | Tensor
    budget_B: Tensor
    newest_B: Tensor

    @classmethod
    def of(cls, layer: LayerCache, **others: Any) -> Entries:
        """Those of a cache's layer; `others`: what it does not know."""
        pool = layer.pool
        return cls(
            k=pool.k[0, 0],
            v=pool.v[0, 0],
            pos=pool.pos,
            table=layer.table,
            used=layer.used,
            listed=layer.listed,
            skipped=layer.skipped,
            keep=pool.companions.get("keep"),
            mass=pool.companions.get("mass"),
            bias=pool.companions.get("bias"),
            **others,
        )


def evict(
    policy: Policy,
    shape: Shape,
    layers: Sequence[Entries],
    next_pos_B: Tensor,
    counted_B: Tensor,
    active_B: Tensor,
    limit_NB: Tensor,
    regions: bool = False,
) -> Tensor:
    """Bring the rows that are over their limit back to their budget, by masks alone; counted_B is brought up to date.

    Args:
        policy: one that is `traceable`.
        next_pos_B: int32, positions of the next tokens.
        counted_B: int32; queries before these have been counted into the entries' mass.
        active_B: bool, rows that go on; the others lose nothing.
        limit_NB: int64, entries per head beyond which a row is over its budget.
        regions: layers are regions of the graph, where it is compiled.
    Returns:
        int64 [2]: whether a row was over its limit, and the most entries that a head held.
    """
    rank, mask = (_rank_region, _mask_region) if regions else (rank_layer, mask_layer)
    ranked = [rank(policy, shape, layer, next_pos_B, counted_B) for layer in layers]
    keeps, found_2 = choose(policy, ranked, torch.stack([layer.budget_B for layer in layers]), limit_NB, active_B)
    for layer, keep_BXC, (*_, mass_BXC) in zip(layers, keeps, ranked, strict=True):
        write(layer, *mask(shape, layer, keep_BXC, mass_BXC))
    counted_B.copy_(next_pos_B)
    return found_2


# A region returns a plain tuple of tensors: torch 2.13 traces one that returns anything else once for every layer.
Ranked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def rank_layer(policy: Policy, shape: Shape, layer: Entries, next_pos_B: Tensor, counted_B: Tensor) -> Ranked:
    """What one layer's entries are chosen by: score, position and protection [B, X, C]; how many live in each list [B, K]; the
    attention that each has collected [B, X, C], or nothing [0] where the policy does not look at it.
    """
    slot_RC = columns(layer.table, layer.used, shape.pages, shape.page)
    obs = observe(policy, shape, layer, slot_RC, next_pos_B, counted_B)
    mass_BXC = obs.v.new_empty(0) if obs.mass is None else obs.mass
    return *policy.ranking(obs), (obs.pos >= 0).sum(-1), mass_BXC


def observe(
    policy: Policy, shape: Shape, layer: Entries, slot_RC: Tensor, next_pos_B: Tensor, counted_B: Tensor
) -> Observation:
    """What a policy sees of the entries in these slots (slot 0: none), the attention of the queries since counted_B added."""
    lists, C = slot_RC.shape
    B, K = lists // shape.heads, shape.heads
    pos_BKC = read(layer.pos, slot_RC).view(B, K, C)
    q_BHWD, q_pos_BW = recent(layer.ring, next_pos_B, shape.ring_size)
    observed, rotary = max(policy.observed, 1), layer.rotary

    def companion(slab: Tensor | None) -> Tensor | None:
        return None if slab is None else read(slab, slot_RC).view(B, K, C, -1).transpose(2, 3).flatten(1, 2)

    obs = Observation(
        q=q_BHWD[:, :, -observed:],
        q_pos=q_pos_BW[:, -observed:],
        k=read(layer.k, slot_RC).view(B, K, C, -1),
        v=read(layer.v, slot_RC).view(B, K, C, -1),
        pos=pos_BKC.long(),
        root=layer.root,
        softmax_scale=shape.softmax_scale,
        softcap=shape.softcap,
        sliding_window=layer.reach,
        layer=layer.number,
        num_layers=shape.num_layers,
        keep=companion(layer.keep),
        mass=companion(layer.mass),
        bias=None if layer.bias is None else read(layer.bias, slot_RC).view(B, K, C),
        protected=protected(policy, pos_BKC, layer.newest_B, next_pos_B),
        budget_B=layer.budget_B,
        budgets=shape.budgets,
        rotary=None if rotary is None else lambda pos_BT: rotary(pos_BT, pos_BT.amax(-1) + 1, torch.float32),
        among=shape.ranks,
    )
    if obs.mass is None:
        return obs
    fresh_BW = (q_pos_BW >= counted_B[:, None]) & (q_pos_BW >= 0)
    gained_BHC = weighted_attention(replace(obs, q=q_BHWD, q_pos=q_pos_BW), fresh_BW.to(obs.dtype))
    if obs.mass.shape[1] != gained_BHC.shape[1]:
        gained_BHC = gained_BHC.unflatten(1, (K, -1)).mean(2)
    return replace(obs, mass=obs.mass + gained_BHC.to(obs.mass.dtype))


def choose(
    policy: Policy, ranked: Sequence[Ranked], budget_NB: Tensor, limit_NB: Tensor, active_B: Tensor
) -> tuple[Sequence[Tensor], Tensor]:
    """keep [B, X, C] bool of every layer, in which rows that are not over their limit keep everything; and evict's result."""
    allocation = policy.allocation
    score, pos, protected, live, _ = zip(*ranked, strict=True)
    live_NBK = torch.stack(live)
    over_B = over_limit(allocation, live_NBK, limit_NB) & active_B
    if isinstance(allocation, Global):
        keeps = allocation.select_layers(score, pos, protected, budget_NB[0])
    else:  # a layer's row is a row of a batch like any other
        rows = torch.cat(score), torch.cat(pos), torch.cat(protected)
        keeps = list(allocation.select(*rows, budget_NB.flatten()).chunk(len(ranked)))
    keeps = [keep_BXC | (~over_B[:, None, None] & (pos_BXC >= 0)) for keep_BXC, pos_BXC in zip(keeps, pos, strict=True)]
    return keeps, torch.stack([over_B.any().long(), live_NBK.amax()])


def over_limit(allocation: Allocation, live_NBK: Tensor, limit_NB: Tensor) -> Tensor:
    """Bool [B]: rows that have outgrown their budget, or the policy's high-water mark: heads, layers or all, as they share it."""
    whole = live_NBK.shape[2] * limit_NB
    over_NB = live_NBK.sum(-1) - whole if allocation.ragged else live_NBK.amax(-1) - limit_NB
    return (over_NB.sum(0) if allocation.across_layers else over_NB.amax(0)) > 0


def mask_layer(shape: Shape, layer: Entries, keep_BXC: Tensor, mass_BXC: Tensor) -> tuple[Tensor, ...]:
    """What there is to `write` of one layer: the slot of every column [R*C]; its position, -1 for what goes, [R*C] int32; the
    pages that attention reads [R,M] and how many it skips [R]; and the companions of every column [R*C, ...], where it has any.
    """
    slot_RC = columns(layer.table, layer.used, shape.pages, shape.page)
    keep_BKGC = keep_BXC.unflatten(1, (shape.heads, -1))  # an entry lives as long as a query head of its group keeps it
    pos_RC = read(layer.pos, slot_RC).masked_fill(~keep_BKGC.any(2).view_as(slot_RC), EMPTY)
    companions = []
    if layer.keep is not None:
        companions.append(keep_BKGC.transpose(2, 3).flatten(0, 2))
    if layer.mass is not None:
        nothing_BK1C = (slot_RC == 0).view(*keep_BKGC.shape[:2], 1, -1)
        mass_BKGC = mass_BXC.unflatten(1, (shape.heads, -1)).masked_fill(nothing_BK1C, 0)
        companions.append(mass_BKGC.transpose(2, 3).flatten(0, 2))
    listed = listed_pages(layer.table, layer.used, pos_RC, shape.page)
    return slot_RC.flatten(), pos_RC.flatten(), *listed, *companions


def write(
    layer: Entries, slot_n: Tensor, pos_n: Tensor, listed_RM: Tensor, skipped_R: Tensor, *companions: Tensor
) -> None:
    """Columns without an entry all write the same, to slot 0, which is nobody's."""
    slabs = [slab for slab in (layer.keep, layer.mass) if slab is not None]
    for slab, value in zip([layer.pos, *slabs], [pos_n, *companions], strict=True):
        slab.index_copy_(0, slot_n, value)  # an indexed assignment would copy the slab in a graph
    layer.listed[:, : listed_RM.shape[1]].copy_(listed_RM)
    layer.skipped.copy_(skipped_R)


# Regions only compute: torch 2.13 loses what several of them write to views of one tensor.
_rank_region = torch.compiler.nested_compile_region(rank_layer)
_mask_region = torch.compiler.nested_compile_region(mask_layer)

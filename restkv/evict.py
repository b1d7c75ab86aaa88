"""Eviction: observe, choose, and let the losers go: after a prompt, and again and again while decoding.

Letters: B batch rows, H query heads, K KV heads, G = H / K, N layers, C entries (columns) of one head, L prompt length, D head
dim, W observed queries, R = B*K page lists, X heads with a kept set of their own (K, or H for granularity "query").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.layers import Decoder
from modeling.pages import UNBOUNDED, Companions, KVCache, LayerCache
from restkv.errors import PolicyError
from restkv.mass import column_mass
from restkv.observe import Observation, cross_gram_of, gram_of, weighted_attention
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


def companions_of(policy: Policy, model: Decoder) -> Companions:
    """The per-slot data a cache must carry for this policy."""
    config = model.config
    per_query = policy.granularity == "query"
    companions: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if per_query and policy.budget is not None:
        companions["keep"] = ((config.group,), torch.bool)
    if "mass" in policy.needs:
        companions["mass"] = ((config.group if per_query else 1,), torch.float32)
    if policy.slot_positions:
        companions["raw"] = ((config.head_dim,), model.dtype)
    return companions


class Evictor:
    """A policy at work on the rows of one cache.

    Args:
        lengths: prompt length of every row; what fractional budgets are fractions of.
    Raises:
        PolicyError: the protected entries of a row do not fit into its budget.
    Attributes:
        budgets: [N][B] entries per head (UNBOUNDED for a policy without budget).
    """

    def __init__(self, model: Decoder, policy: Policy, grams: Grams, lengths: Sequence[int]) -> None:
        self.model, self.policy, self.grams = model, policy, grams
        layers = model.config.num_layers
        per_row = [
            [UNBOUNDED] * layers if policy.budget is None else policy.layer_budgets(length, layers)
            for length in lengths
        ]
        for length, budgets in zip(lengths, per_row, strict=True):
            _check_protected(policy, length, min(budgets))
        self.budgets = [list(column) for column in zip(*per_row, strict=True)]
        self.states = [policy.start() for _ in lengths]
        # Queries before these positions have been counted into the companions' mass.
        self._counted_B = torch.zeros(len(lengths), dtype=torch.int32, device=model.device)

    def row(self, index: int) -> Evictor:
        """The evictor of one row alone (KVCache.row); states are shared with this one."""
        part = copy.copy(self)
        part.budgets = [[column[index]] for column in self.budgets]
        part.states = self.states[index : index + 1]
        part._counted_B = self._counted_B[index : index + 1]
        return part

    def fork(self) -> Evictor:
        twin = copy.copy(self)
        twin.states, twin._counted_B = copy.deepcopy(self.states), self._counted_B.clone()
        return twin

    # -- after a prompt

    def watch_prompt(
        self, layer: int, length: int
    ) -> tuple[Callable[[Tensor, Tensor, int], None] | None, Tensor | None]:
        """A callback for dense_layer that adds up the attention of all prompt queries, and the sums [X, L] it fills."""
        if "mass" not in self.policy.needs:
            return None, None
        config, window = self.model.config, self.model.blocks[layer].window
        per_query = self.policy.granularity == "query"
        mass_XL = torch.zeros(config.num_heads if per_query else config.num_kv_heads, length, device=self.model.device)

        def watch(q_THD: Tensor, k_KCD: Tensor, start: int) -> None:
            mass_HC = column_mass(
                q_THD, k_KCD, start, scale=config.attn_scale, softcap=config.attn_softcap, window=window
            )
            part_XC = mass_HC if per_query else mass_HC.unflatten(0, (config.num_kv_heads, -1)).mean(1)
            mass_XL[:, : part_XC.shape[1]] += part_XC

        return watch, mass_XL

    def store_prompt(
        self,
        cache: KVCache,
        layer: int,
        q_HWD: Tensor,
        k_KLD: Tensor,
        v_KLD: Tensor,
        raw_KLD: Tensor | None,
        mass_XL: Tensor | None,
    ) -> None:
        """Write what the policy keeps of one layer's prompt into a one-row cache, and remember the last queries."""
        heads, length, _ = k_KLD.shape
        device = k_KLD.device
        pos_KL = torch.arange(length, device=device).expand(heads, length)
        budget = self.budgets[layer][0]
        keep_1XL = None
        if budget < length:
            q_1HWD = q_HWD[None, :, -max(self.policy.observed_prompt, 1) :]
            obs = self._observation(
                layer,
                q=q_1HWD,
                q_pos=torch.arange(length - q_1HWD.shape[2], length, device=device)[None],
                k=k_KLD[None],
                v=v_KLD[None],
                pos=pos_KL[None],
                budget_B=torch.tensor([budget], device=device),
                next_pos_B=torch.tensor([length], device=device),
                mass=None if mass_XL is None else mass_XL[None],
            )
            keep_1XL = self.policy.keep(obs, self.states)
        keep_KL, companions = self._stored(keep_1XL, None if mass_XL is None else mass_XL[None], heads)
        if raw_KLD is not None:
            companions["raw"] = raw_KLD[None]
        target = cache.layers[layer]
        target.append(
            0,
            k_KLD,
            v_KLD,
            pos_KL,
            None if keep_KL is None else keep_KL[0],
            {name: data[0] for name, data in companions.items()},
        )
        if cache.window:
            cache.remember(layer, 0, q_HWD, length - 1)
        self._moved(target, layer, keep_KL is not None)

    def prompt_done(self, cache: KVCache, length: int) -> None:
        """All layers of a one-row cache hold their share of the prompt."""
        cache.next_pos.fill_(length)
        self._counted_B.fill_(length)
        self._align(cache)

    # -- while decoding

    def round(self, cache: KVCache, compact: bool) -> bool:
        """Bring every head of every row back to its budget; True if a row was over it.

        Args:
            compact: reclaim the pages of what goes (and of what was only marked before); else mark the losers dead.
        """
        over_B = self._over(cache)
        if "mass" not in self.policy.needs and not any(over_B):
            return False
        for index, layer in enumerate(cache.layers):
            slot_RC, pos_RC = layer.slots()
            budgets = [b if over else UNBOUNDED for b, over in zip(self.budgets[index], over_B, strict=True)]
            obs = self._cached(cache, index, slot_RC, pos_RC, budgets)
            keep_BXC = self.policy.keep(obs, self.states)
            keep_BKC, companions = self._stored(keep_BXC, obs.mass, layer.heads)
            assert keep_BKC is not None
            keep_RC = keep_BKC.flatten(0, 1)
            flat = {name: data.flatten(0, 1) for name, data in companions.items()}
            if compact:
                layer.compact(keep_RC, flat)
            else:
                layer.mark(~keep_RC, flat)
            self._moved(layer, index, any(over_B))
        self._counted_B.copy_(cache.next_pos)
        self._align(cache)
        return any(over_B)

    def _over(self, cache: KVCache) -> list[bool]:
        """Which rows have outgrown their budget (or the policy's high-water mark) in any head of any layer."""
        over = [False] * cache.rows
        mark = self.policy.high_water or 0
        for layer, budgets in zip(cache.layers, self.budgets, strict=True):
            used = layer.lengths()
            if all(n <= max(budgets[i // layer.heads], mark) for i, n in enumerate(used)):
                continue  # even counting the dead
            live = layer.live_counts().amax(-1).tolist()  # sync: once per eviction, only when the lists are long
            over = [o or n > max(b, mark) for o, n, b in zip(over, live, budgets, strict=True)]
        return over

    def _cached(
        self, cache: KVCache, index: int, slot_RC: Tensor, pos_RC: Tensor, budgets: Sequence[int]
    ) -> Observation:
        """The observation of one layer's pages."""
        layer = cache.layers[index]
        pool, shape = layer.pool, (layer.rows, layer.heads, slot_RC.shape[1])
        per_slot = {
            name: pool.companions[name][slot_RC].view(*shape, -1).transpose(2, 3)
            for name in ("keep", "mass")
            if name in pool.companions
        }
        q_BHWD, q_pos_BW = cache.recent(index)
        observed = max(self.policy.observed, 1)
        obs = self._observation(
            index,
            q=q_BHWD[:, :, -observed:],
            q_pos=q_pos_BW[:, -observed:],
            k=pool.k[0, 0, slot_RC].view(*shape, -1),
            v=pool.v[0, 0, slot_RC].view(*shape, -1),
            pos=pos_RC.view(shape).long(),
            keep=per_slot["keep"].flatten(1, 2) if "keep" in per_slot else None,
            budget_B=torch.tensor(budgets, device=pos_RC.device),
            next_pos_B=cache.next_pos,
        )
        if "mass" not in per_slot:
            return obs
        fresh_BW = (q_pos_BW >= self._counted_B[:, None]) & (q_pos_BW >= 0)
        everything = copy.copy(obs)
        object.__setattr__(everything, "q", q_BHWD)
        object.__setattr__(everything, "q_pos", q_pos_BW)
        gained_BHC = weighted_attention(everything, fresh_BW.float())
        mass_BXC = per_slot["mass"].flatten(1, 2)
        if mass_BXC.shape[1] != gained_BHC.shape[1]:
            gained_BHC = gained_BHC.unflatten(1, (layer.heads, -1)).mean(2)
        object.__setattr__(obs, "mass", mass_BXC + gained_BHC)
        return obs

    # -- what both share

    def _stored(
        self, keep_BXC: Tensor | None, mass_BXC: Tensor | None, heads: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What to store: entries per KV head [B, K, C] (None: all) and the companions [B, K, C, ...]."""
        companions: dict[str, Tensor] = {}
        if mass_BXC is not None:
            companions["mass"] = mass_BXC.unflatten(1, (heads, -1)).transpose(2, 3)
        if keep_BXC is None or self.policy.granularity == "kv":
            return keep_BXC, companions
        keep_BKGC = keep_BXC.unflatten(1, (heads, -1))
        companions["keep"] = keep_BKGC.transpose(2, 3)
        return keep_BKGC.any(2), companions  # entries live once per KV head: the union of its query heads' sets

    def _moved(self, layer: LayerCache, index: int, changed: bool) -> None:
        """Slots are the positions of such a policy: give the survivors the phase of their new rank."""
        if changed and self.policy.slot_positions:
            layer.rerotate(self._rotary(index))

    def _align(self, cache: KVCache) -> None:
        """Where slots are the positions, the next token's phase is the number of entries its row still has."""
        if self.policy.slot_positions:
            cache.lag.copy_(cache.next_pos - cache.layers[0].live_counts()[:, 0])

    def _rotary(self, layer: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        rotary = self.model.rotaries[self.model.blocks[layer].rope]
        return lambda pos_BT: rotary(pos_BT, pos_BT.amax(-1) + 1, torch.float32)

    def _observation(
        self,
        layer: int,
        *,
        q: Tensor,
        q_pos: Tensor,
        k: Tensor,
        v: Tensor,
        pos: Tensor,
        budget_B: Tensor,
        next_pos_B: Tensor,
        keep: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Observation:
        config = self.model.config
        return Observation(
            q=q,
            q_pos=q_pos,
            k=k,
            v=v,
            pos=pos,
            gram=self.grams.get(layer, self.policy.needs),
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            window=self.model.blocks[layer].window,
            layer=layer,
            num_layers=config.num_layers,
            keep=keep,
            mass=mass,
            protected=_protected(self.policy, pos, next_pos_B),
            budget_B=budget_B,
            rotary=self._rotary(layer) if "rotary" in self.policy.needs else None,
        )


def _protected(policy: Policy, pos_BKC: Tensor, next_pos_B: Tensor) -> Tensor:
    """Bool [B, K, C]: sinks, the newest `window` entries and the user's spans, which no score can evict."""
    kept_BKC = (pos_BKC >= (next_pos_B - policy.window)[:, None, None]) | (pos_BKC < policy.sinks)
    for start, end in policy.protect:
        kept_BKC = kept_BKC | ((pos_BKC >= start) & (pos_BKC < end))
    return kept_BKC & (pos_BKC >= 0)


def _check_protected(policy: Policy, length: int, budget: int) -> None:
    """Refuse spans that leave the budget no room: what is protected must fit into it."""
    positions = set(range(min(policy.sinks, length))) | set(range(max(0, length - policy.window), length))
    for start, end in policy.protect:
        positions |= set(range(min(start, length), min(end, length)))
    if len(positions) > budget < length:
        raise PolicyError(
            f"budget {budget} is smaller than the {len(positions)} protected entries (sinks, window and protected spans) of a "
            f"prompt of {length} tokens; raise the budget or protect less"
        )

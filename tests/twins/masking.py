"""A dense model that masks what an engine has evicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laws.law import protected
from modeling.layers import Decoder
from restkv.observe import Observation, group_root_of, root_of
from restkv.policies import Policy
from twins import reference


class Dense:
    """One row of a model that forgets nothing: what its session has evicted is only masked, by a set per query head."""

    def __init__(self, model: Decoder) -> None:
        config = self.config = model.config
        self.model, self.length = model, 0
        self.q = [torch.zeros(0, config.num_heads, config.head_dim, dtype=model.dtype) for _ in model.blocks]
        self.k = [torch.zeros(0, config.num_kv_heads, config.head_dim, dtype=model.dtype) for _ in model.blocks]
        self.v = list(self.k)
        self.held: list[list[set[int]]] = [[set() for _ in range(config.num_heads)] for _ in model.blocks]

    def run(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of these tokens."""
        config, new = self.config, range(self.length, self.length + len(ids))
        self.length += len(ids)
        x_1TE = self.model.embed(torch.tensor([ids]))
        ropes = self.model.rotary(torch.tensor([new]), torch.tensor([self.length]))
        for i, block in enumerate(self.model.blocks):
            q, k, v = (t[0] for t in block.project(x_1TE, *ropes[block.rope]))
            self.q[i], self.k[i], self.v[i] = (
                torch.cat(pair) for pair in ((self.q[i], q), (self.k[i], k), (self.v[i], v))
            )
            o_THD = torch.zeros_like(q)
            for h, mine in enumerate(self.held[i]):
                mine.update(new)
                for t, at in enumerate(new):
                    far = -1 if block.window is None else at - block.window
                    seen = sorted(p for p in mine if far < p <= at)
                    logits = self.k[i][seen, h // config.group] @ q[t, h] * config.attn_scale
                    if config.attn_softcap is not None:
                        logits = config.attn_softcap * torch.tanh(logits / config.attn_softcap)
                    o_THD[t, h] = logits.softmax(0) @ self.v[i][seen, h // config.group]
            x_1TE = block.finish(x_1TE, o_THD[None])
        return self.model.head(x_1TE)[0, -1]

    def adopt(self, after: list[list[set[int]]], policy: Policy, budgets: Sequence[int]) -> None:
        """Forget what the session has evicted, which must be what the slow twin of the policy's score ranks lowest."""
        for i, (mine, theirs) in enumerate(zip(self.held, after, strict=True)):
            assert all(b <= a for a, b in zip(mine, theirs, strict=True))
            if mine != theirs:
                self._check(i, theirs, policy, budgets[i])
        self.held = [[set(heads) for heads in layer] for layer in after]

    def _check(self, i: int, after: list[set[int]], policy: Policy, budget: int) -> None:
        block, config, W = self.model.blocks[i], self.config, min(policy.window, self.length)
        per_query = policy.granularity == "query"
        keep_HL = torch.tensor([[p in heads for p in range(self.length)] for heads in self.held[i]])
        any_KL = keep_HL.unflatten(0, (config.num_kv_heads, -1)).any(1)
        w_o = block.output_weight()
        joint = "group_root" in policy.needs
        obs = Observation(
            q=self.q[i][-W:].transpose(0, 1)[None],
            q_pos=torch.arange(self.length - W, self.length)[None],
            k=self.k[i].transpose(0, 1)[None],
            v=self.v[i].transpose(0, 1)[None],
            pos=torch.arange(self.length).where(any_KL, -1)[None],
            root=group_root_of(w_o, config.num_kv_heads) if joint else root_of(w_o),
            softmax_scale=config.attn_scale,
            softcap=config.attn_softcap,
            sliding_window=block.window,
            keep=keep_HL[None] if per_query else None,
            budget_B=budget,
        )
        scores = reference.scores(policy, obs, w_o)[0]
        heads = [(h, h) for h in range(config.num_heads)]
        if not per_query:
            heads = [(x, x * config.group) for x in range(config.num_kv_heads)]
        for x, h in heads:
            always = protected(policy, sorted(self.held[i][h]), self.length, budget)
            kept = [scores[x][p] for p in after[h] - always]
            gone = [scores[x][p] for p in self.held[i][h] - after[h]]
            if kept and gone:
                assert min(kept) >= max(gone) - 1e-9 * max(1e-3, abs(max(gone)))

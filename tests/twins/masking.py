"""A dense model that masks what an engine has evicted, and asks a slow twin whether that was right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from restkv.observe import Observation, group_root_of, root_of
from restkv.policies import Policy
from restkv.testing.dense import Dense
from restkv.testing.watch import protected
from twins import reference


class Ranked(Dense):
    """A dense row that also checks the session's choices against the slow twin of the policy's score."""

    def follow(self, after: list[list[set[int]]], policy: Policy, budgets: Sequence[int]) -> None:
        """Forget what the session has evicted, which must be what the slow twin of the policy's score ranks lowest."""
        for i, (mine, theirs) in enumerate(zip(self.held, after, strict=True)):
            if mine != theirs:
                self._check(i, theirs, policy, budgets[i])
        self.adopt(after)

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

"""The dense reference: one row of a model that forgets nothing, in which what a session has evicted is only masked.

Letters: T new tokens, L tokens so far, H query heads, K KV heads, G = H / K, D head dim, E hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.layers import Decoder


class Dense:
    """One row, in plain tensors and without pages.

    Attributes:
        q, k, v: of every layer, [L, H or K, D], after RoPE.
        bias: of every layer, [L, K]: what is added to the logits of an entry.
        held: of every layer, the positions that each query head still sees.
    """

    def __init__(self, model: Decoder) -> None:
        config = self.config = model.config
        self.model, self.length = model, 0
        self.q = [torch.zeros(0, config.num_heads, config.head_dim, dtype=model.dtype) for _ in model.blocks]
        self.k = [torch.zeros(0, config.num_kv_heads, config.head_dim, dtype=model.dtype) for _ in model.blocks]
        self.v = list(self.k)
        self.bias = [torch.zeros(0, config.num_kv_heads, dtype=model.dtype) for _ in model.blocks]
        self.held: list[list[set[int]]] = [[set() for _ in range(config.num_heads)] for _ in model.blocks]

    def run(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after the last of these tokens."""
        config, new = self.config, range(self.length, self.length + len(ids))
        self.length += len(ids)
        x_1TE = self.model.embed(torch.tensor([ids]))
        ropes = self.model.rotary(torch.tensor([new]), torch.tensor([self.length]))
        pos_L, pos_T1 = torch.arange(self.length), torch.tensor(new)[:, None]
        for i, block in enumerate(self.model.blocks):
            fresh = (t[0] for t in block.project(x_1TE, *ropes[block.rope]))
            old = (self.q[i], self.k[i], self.v[i])
            self.q[i], self.k[i], self.v[i] = (torch.cat(pair) for pair in zip(old, fresh, strict=True))
            self.bias[i] = torch.cat([self.bias[i], self.bias[i].new_zeros(len(ids), config.num_kv_heads)])
            held_HL = torch.zeros(config.num_heads, self.length, dtype=torch.bool)
            for head, mine in enumerate(self.held[i]):
                mine.update(new)
                held_HL[head, list(mine)] = True
            seen_HTL = held_HL[:, None] & (pos_L <= pos_T1)
            if block.window is not None:
                seen_HTL = seen_HTL & (pos_L > pos_T1 - block.window)
            q_HTD = self.q[i][-len(ids) :].transpose(0, 1)
            k_HLD, v_HLD = (x.transpose(0, 1).repeat_interleave(config.group, 0) for x in (self.k[i], self.v[i]))
            logits_HTL = q_HTD @ k_HLD.mT * config.attn_scale
            if config.attn_softcap is not None:
                logits_HTL = config.attn_softcap * torch.tanh(logits_HTL / config.attn_softcap)
            logits_HTL = logits_HTL + self.bias[i].T.repeat_interleave(config.group, 0)[:, None]
            o_HTD = logits_HTL.masked_fill(~seen_HTL, -torch.inf).softmax(-1) @ v_HLD
            x_1TE = block.finish(x_1TE, o_HTD.transpose(0, 1)[None])
        return self.model.head(x_1TE)[0, -1]

    def replace(self, layer: int, head: int, pos: Sequence[int], v_nD: Tensor, bias_n: Tensor) -> None:
        """Give the entries of a KV head at these positions other values and biases."""
        self.v[layer][pos, head], self.bias[layer][pos, head] = v_nD, bias_n.to(v_nD.dtype)

    def adopt(self, after: Sequence[Sequence[set[int]]]) -> None:
        """Forget what is not in `after`, [layer][query head]: positions that the session holds.

        Raises:
            AssertionError: the session holds something that it had lost before.
        """
        for mine, theirs in zip(self.held, after, strict=True):
            assert all(b <= a for a, b in zip(mine, theirs, strict=True)), "an entry that was evicted is there again"
        self.held = [[set(heads) for heads in layer] for layer in after]

"""The slow twin of the engine: one row, lists of entries per KV head, evicted by the papers' own step-by-step rules.

A `Row` runs a Decoder's own projections over dense tensors, with its own attention; nothing of modeling/pages.py,
restkv/evict.py or restkv/session.py is used. Keys are kept before RoPE too, so that positions may be slots.

Letters: T new tokens, C entries of one head, H query heads, K KV heads, G = H / K, D head dim, E width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling.config import RopeConfig
from modeling.layers import Decoder, softcap
from modeling.rope import rotate
from restkv.observe import Observation
from restkv.policies import LaCache, Policy, StreamingLLM
from restkv.testing.observed import root_for
from twins.reference_policies import Ladders, best

Kept = list[list[list[int]]]  # [layer][KV head, or query head][entry]: positions, ascending


# -- models


def with_rope(model: Decoder, **rope) -> Decoder:
    """The same weights under another rotary embedding."""
    config = model.config
    old = config.ropes[0]
    ropes = (RopeConfig(rope.pop("kind"), rope.pop("theta", old.theta), old.dim, **rope),)
    twin = Decoder(replace(config, ropes=ropes)).requires_grad_(False).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# -- one row


@dataclass
class Head:
    """The entries of one KV head, oldest first."""

    pos: list[int]
    raw: Tensor  # [C, D] before RoPE
    k: Tensor  # [C, D]
    v: Tensor  # [C, D]
    held: Tensor  # [G, C] bool: which query heads still see the entry
    mass: Tensor  # [G, C] softmax weight collected so far

    def append(self, pos: Sequence[int], raw_TD: Tensor, k_TD: Tensor, v_TD: Tensor) -> None:
        group, count = len(self.held), len(pos)
        self.pos = [*self.pos, *pos]
        self.raw, self.k, self.v = (torch.cat(pair) for pair in ((self.raw, raw_TD), (self.k, k_TD), (self.v, v_TD)))
        self.held = torch.cat([self.held, torch.ones(group, count, dtype=torch.bool)], 1)
        self.mass = torch.cat([self.mass, torch.zeros(group, count, dtype=torch.float64)], 1)

    def keep(self, stays: Sequence[Sequence[int]]) -> None:
        """Positions that stay, for each query head of the group; an entry lives as long as one of them holds it."""
        self.held = torch.tensor([[p in set(mine) for p in self.pos] for mine in stays]) & self.held
        alive = self.held.any(0)
        self.pos = [p for p, lives in zip(self.pos, alive.tolist(), strict=True) if lives]
        self.raw, self.k, self.v = self.raw[alive], self.k[alive], self.v[alive]
        self.held, self.mass = self.held[:, alive], self.mass[:, alive]


class Row:
    """A model, a policy and the tokens of one row so far.

    Attributes:
        heads: [layer][KV head].
        evictions: how often the row was over its budget while decoding.
    """

    def __init__(self, model: Decoder, policy: Policy) -> None:
        config = self.config = model.config
        self.model, self.policy = model, policy
        none_0D = torch.zeros(0, config.head_dim, dtype=model.dtype)
        bits = torch.zeros(config.group, 0)
        self.heads = [
            [Head([], none_0D, none_0D, none_0D, bits.bool(), bits.double()) for _ in range(config.num_kv_heads)]
            for _ in range(config.num_layers)
        ]
        self.queries: list[list[Tensor]] = [[] for _ in self.heads]  # [H, D] after RoPE, one per token
        self.length = self.evictions = self._since = 0
        self.budget: float = math.inf  # entries per head; a fraction is one of the prompt
        self._rule = RULES.get(policy.name, Observed)(self)

    # -- what a user does

    def prefill(self, ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Read a prompt, whole or in chunks, each attending before it is evicted; logits [V] after its last token."""
        if self.policy.budget is not None:
            self.budget = self.policy.budget_for(len(ids))
        first = ids if chunk is None else ids[:chunk]
        logits_TV = self._run(first)
        if len(first) > self.budget:
            self._evict(prompt=True)
        for start in range(len(first), len(ids), chunk or 1):
            logits_TV = self._run(ids[start : start + (chunk or 1)])
            self._evict_if_over()
        return logits_TV[-1]

    def extend(self, ids: Sequence[int], chunk: int) -> Tensor:
        """Append several tokens, chunk by chunk; logits [V] after the last. See read_all."""
        return self.read_all(ids, chunk)[-1]

    def read_all(self, ids: Sequence[int], chunk: int) -> Tensor:
        """Append several tokens, chunk by chunk; an interval that ends within a chunk ends with it. Logits [T, V]."""
        said = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            said.append(self._run(piece))
            self._since += len(piece)
            if self.policy.interval and self._since >= self.policy.interval:
                self._since = 0
                self.evictions += self._evict_if_over()
        return torch.cat(said)

    def feed(self, token: int) -> Tensor:
        """Append one token."""
        return self.extend([token], 1)

    def kept(self) -> Kept:
        """Positions held, per KV head or (granularity "query") per query head."""
        return [
            [
                [p for p, holds in zip(head.pos, mine, strict=True) if holds]
                for head in layer
                for mine in (head.held.tolist() if self.policy.granularity == "query" else [[True] * len(head.pos)])
            ]
            for layer in self.heads
        ]

    # -- a forward pass

    def _run(self, ids: Sequence[int]) -> Tensor:
        config, T = self.config, len(ids)
        new = range(self.length, self.length + T)
        first = len(self.heads[0][0].pos) if self.policy.slot_positions else self.length
        x_1TE = self.model.embed(torch.tensor([ids]))
        ropes = self.model.rotary(torch.arange(first, first + T)[None], torch.tensor([first + T]))
        for block, layer, queries in zip(self.model.blocks, self.heads, self.queries, strict=True):
            q_1THD, raw_1TKD, v_1TKD = block.unrotated(x_1TE)
            q_THD, k_TKD = (rotate(t, *ropes[block.rope])[0] for t in (q_1THD, raw_1TKD))
            queries.extend(q_THD)
            o_THD = torch.empty_like(q_THD)
            for j, head in enumerate(layer):
                head.append(new, raw_1TKD[0, :, j], k_TKD[:, j], v_1TKD[0, :, j])
                pos_C, pos_T1 = torch.tensor(head.pos), torch.tensor(new)[:, None]
                seen_TC = pos_C <= pos_T1
                if block.window is not None:
                    seen_TC = seen_TC & (pos_C > pos_T1 - block.window)
                for g in range(config.group):
                    h = j * config.group + g
                    logits_TC = softcap(q_THD[:, h] @ head.k.T * config.attn_scale, config.attn_softcap)
                    weight_TC = logits_TC.masked_fill(~(seen_TC & head.held[g]), -torch.inf).softmax(-1)
                    head.mass[g] += weight_TC.sum(0)
                    o_THD[:, h] = weight_TC @ head.v
            x_1TE = block.finish(x_1TE, o_THD[None])
        self.length += T
        return self.model.head(x_1TE[0])

    # -- evictions

    def _evict_if_over(self) -> bool:
        most = max(len(head.pos) for layer in self.heads for head in layer)
        over = most > max(self.budget, self.policy.high_water or 0)
        if over:
            self._evict(prompt=False)
        return over

    def _evict(self, prompt: bool) -> None:
        group = self.config.group
        for block, layer, stays in zip(self.model.blocks, self.heads, self._rule(prompt), strict=True):
            for j, head in enumerate(layer):
                mine = stays[j * group : (j + 1) * group] if self.policy.granularity == "query" else [stays[j]] * group
                head.keep(mine)
                if self.policy.slot_positions and head.pos:
                    C = len(head.pos)
                    rope = self.model.rotaries[block.rope]
                    cos_1CD, sin_1CD = rope(torch.arange(C)[None], torch.tensor([C]), self.model.dtype)
                    head.k = rotate(head.raw[None, :, None], cos_1CD, sin_1CD)[0, :, 0]


# -- rules: what stays, per layer and KV head (or query head)


class Rule:
    def __init__(self, row: Row) -> None:
        self.row, self.policy = row, row.policy

    def __call__(self, prompt: bool) -> Kept:
        return [self.layer(index, prompt) for index in range(len(self.row.heads))]

    def layer(self, index: int, prompt: bool) -> list[list[int]]:
        raise NotImplementedError

    def ranked(self, index: int, held: Sequence[int], value: dict[int, float]) -> list[int]:
        """All but the lowest, so that `budget` stay: sinks, the newest and spans first, what a window has hidden last."""
        policy, length, window = self.policy, self.row.length, self.row.model.blocks[index].window
        budget = int(self.row.budget)
        newest = length - policy.newest(budget)
        first = {p for p in held if p >= newest or p < policy.sinks}
        first |= {p for p in held for start, end in policy.protect if start <= p < end}
        gone = {p for p in held if window is not None and p <= length - window}
        rank = {p: -math.inf if p in gone else value[p] for p in held}
        others = best([p for p in held if p not in first], rank, budget - len(first))
        return sorted(first | set(others))


class Streaming(Rule):
    """StreamingLLM: the first `sinks` slots and the last `budget - sinks`; the paper's variant: all but the last `window`
    first (docs/sources.md §2.2)."""

    def layer(self, index: int, prompt: bool) -> list[list[int]]:
        policy = self.policy
        assert isinstance(policy, StreamingLLM) and isinstance(policy.budget, int)
        first = policy.sinks if policy.fill == "newest" else policy.budget - policy.window
        return [head.pos[:first] + head.pos[len(head.pos) - policy.budget + first :] for head in self.row.heads[index]]


class HeavyHitters(Rule):
    """H2O: collected attention, the newest always stay (docs/sources.md §2.3); a KV head collects its group's mean."""

    def layer(self, index: int, prompt: bool) -> list[list[int]]:
        stays = []
        for head in self.row.heads[index]:
            per_query = self.policy.granularity == "query"
            lines = head.mass if per_query else head.mass.mean(0, keepdim=True)
            for g, line in enumerate(lines.tolist()):
                held = [p for c, p in enumerate(head.pos) if not per_query or head.held[g, c]]
                stays.append(self.ranked(index, held, dict(zip(head.pos, line, strict=True))))
        return stays


class Tova(Rule):
    """TOVA: the newest query's attention, mean over all query heads, one set per layer (docs/sources.md §2.4)."""

    def layer(self, index: int, prompt: bool) -> list[list[int]]:
        config, heads = self.row.config, self.row.heads[index]
        window = self.row.model.blocks[index].window
        held, newest = heads[0].pos, self.row.length - 1
        total = torch.zeros(len(held), dtype=torch.float64)
        for h in range(config.num_heads):
            head = heads[h // config.group]
            assert head.pos == held
            logits_C = softcap(
                (head.k @ self.row.queries[index][-1][h]).double() * config.attn_scale, config.attn_softcap
            )
            if window is not None:
                logits_C[torch.tensor(held) <= newest - window] = -torch.inf
            total += logits_C.softmax(-1)
        return [self.ranked(index, held, dict(zip(held, total.tolist(), strict=True)))] * len(heads)


class Ladder(Rule):
    """LaCache (docs/sources.md §2.8), slot numbers from the twin that its own tests use."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        policy = self.policy
        assert isinstance(policy, LaCache)
        span = policy.span or row.config.num_layers // 2
        self.slots = Ladders(row.config.num_layers, policy.budget, span, policy.overlap, policy.sinks)

    def __call__(self, prompt: bool) -> Kept:
        lines = self.slots(len(self.row.heads[0][0].pos))
        assert not self.slots.strange, "the released code fails here; choose another case"
        return [
            [[head.pos[slot] for slot in line] for head in layer]
            for line, layer in zip(lines, self.row.heads, strict=True)
        ]


class Observed(Rule):
    """Any policy that scores the last queries: its own score (which has a twin of its own), selected here."""

    def layer(self, index: int, prompt: bool) -> list[list[int]]:
        obs = self.observation(index, prompt)
        per_query = self.policy.granularity == "query"
        columns = obs.held if per_query else obs.pos
        stays = []
        for pos, score in zip(columns[0].tolist(), self.policy.score(obs)[0].tolist(), strict=True):
            value = {p: s for p, s in zip(pos, score, strict=True) if p >= 0}
            stays.append(self.ranked(index, sorted(value), value))
        return stays

    def observation(self, index: int, prompt: bool) -> Observation:
        row, policy = self.row, self.policy
        block, heads, config = row.model.blocks[index], row.heads[index], row.config
        budget = int(row.budget)
        observed = min(max(policy.observed_prompt if prompt else policy.observed, 1), row.length)
        C = max(len(head.pos) for head in heads)

        def padded(lines: list[Tensor], value: float) -> Tensor:
            return torch.stack([torch.cat([x, x.new_full((C - len(x), *x.shape[1:]), value)]) for x in lines])[None]

        pos = padded([torch.tensor(head.pos) for head in heads], -1)
        newest = row.length - policy.newest(budget)
        protected = (pos >= newest) | (pos < policy.sinks)
        for start, end in policy.protect:
            protected = protected | ((pos >= start) & (pos < end))
        keep = None
        if policy.granularity == "query":
            keep = padded([head.held.T for head in heads], False)[0].transpose(1, 2).flatten(0, 1)[None]
        return Observation(
            q=torch.stack(row.queries[index][-observed:], 1)[None],
            q_pos=torch.arange(row.length - observed, row.length)[None],
            k=padded([head.k for head in heads], 0),
            v=padded([head.v for head in heads], 0),
            pos=pos,
            root=root_for(policy, block.output_weight(), config.num_kv_heads),
            softmax_scale=config.attn_scale,
            softcap=config.attn_softcap,
            sliding_window=block.window,
            layer=index,
            num_layers=config.num_layers,
            keep=keep,
            protected=protected & (pos >= 0),
            budget_B=torch.tensor([budget]),
        )


RULES: dict[str, Callable[[Row], Rule]] = {
    "streamingllm": Streaming,
    "h2o": HeavyHitters,
    "tova": Tova,
    "lacache": Ladder,
}

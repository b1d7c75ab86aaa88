"""Generation over token ids: prefill each row, then decode all rows together, evicting every `interval` tokens.

Text lives in lm.py and cli.py. Letters: B batch rows, T new tokens, V vocabulary, E hidden width, K KV heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling.forward import step
from modeling.layers import Decoder
from modeling.pages import UNBOUNDED, KVCache, LayerView
from restkv.evict import Grams, check_protected, evict
from restkv.policies.base import Policy
from restkv.prefill import Progress, prefill
from restkv.sampling import Sampling, sample

COMPILED_SHAPES = 64  # distinct cache shapes a process may compile before torch.compile raises


@dataclass
class Engine:
    """A model and the way its decode step runs; shared by all sessions of a process.

    Args:
        backend: "flex" (compiled) or "sdpa" (eager).
    """

    model: Decoder
    backend: str
    grams: Grams = field(init=False)
    decode: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.grams = Grams(self.model)
        self.decode = _decode
        if self.backend == "flex":
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
            self.decode = torch.compile(_decode, fullgraph=True, dynamic=False)  # fullgraph: raise, never fall back

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(self, rows: int, entries: int, window: int, query_sets: bool, shared: bool = False) -> KVCache:
        """A cache with room for `entries` entries per layer, row and KV head."""
        config = self.model.config
        return KVCache.create(
            windows=config.windows,
            rows=rows,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.model.dtype,
            device=self.device,
            entries=entries,
            page=page_size(entries),
            window=window,
            query_sets=query_sets,
            shared=shared,
        )


def page_size(entries: int) -> int:
    """Slots per page: small caches waste less with small pages, large ones read faster with large pages."""
    return 128 if entries >= 512 else 32


def _decode(
    model: Decoder,
    ids_BT: Tensor,
    pos_BT: Tensor,
    views: list[LayerView],
    queries: list[Tensor],
    window: int,
    backend: str,
) -> Tensor:
    """Logits [B, V] float32 after the last of the T new tokens."""
    return model.head(step(model, ids_BT, pos_BT, views, queries, window, backend)[:, -1])


class Session:
    """Rows of tokens over one paged cache: prefill, then decode step by step under a policy.

    Args:
        engine: model and backend.
        policy: what is evicted, and when.
        lengths: prompt lengths of the rows.
        max_new_tokens: room to plan for; a cache without a decode budget is sized by it.
    """

    def __init__(self, engine: Engine, policy: Policy, lengths: Sequence[int], max_new_tokens: int) -> None:
        self.engine, self.policy = engine, policy
        self.budgets = [UNBOUNDED if policy.budget is None else policy.budget_for(length) for length in lengths]
        for length, budget in zip(lengths, self.budgets, strict=True):
            check_protected(policy, length, budget)
        entries = self._entries(lengths, max_new_tokens)
        observed = policy.window if self._evicts_later else 0
        self.cache = engine.new_cache(len(lengths), entries, observed, policy.granularity == "query")
        self.logits_BV = torch.empty(0)
        self.active = [True] * len(lengths)
        self.evictions = 0
        self.max_live = 0  # most entries a head held when an interval ended
        self._since_eviction = 0
        self._planned = max_new_tokens  # tokens still expected
        self._room = 0  # tokens for which the lists have pages of their own
        self._active_B = torch.ones(len(lengths), dtype=torch.bool, device=engine.device)

    def _entries(self, lengths: Sequence[int], max_new_tokens: int) -> int:
        """Entries per head the cache must hold: a constant of the policy when it bounds the cache, else the job's need.

        Unbounded needs are rounded up by at most a quarter, so that prompts of similar length share a compiled graph.
        """
        policy, group = self.policy, self.engine.model.config.group
        if isinstance(policy.budget, int) and policy.interval is not None:
            union = group if policy.granularity == "query" else 1  # query heads may keep disjoint sets
            return policy.budget * union + policy.interval
        need = max(
            (min(length, budget * (group if policy.granularity == "query" else 1)))
            for length, budget in zip(lengths, self.budgets, strict=True)
        )
        need += min(max_new_tokens, policy.interval) if self._evicts_later and policy.interval else max_new_tokens
        quarter = 1 << max(need.bit_length() - 3, 5)
        return -(-need // quarter) * quarter

    def prefill(self, prompts: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Run the prompts, one row at a time (a row of a batch is the same computation as the prompt alone)."""
        engine = self.engine
        last = [
            prefill(engine.model, self.cache, row, ids, self.policy, engine.grams, self.budgets[row], progress)
            for row, ids in enumerate(prompts)
        ]
        self.logits_BV = engine.model.head(torch.cat(last))

    def sample(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of every row [B] int64, from the current logits; not yet fed to the model."""
        return sample(self.logits_BV, sampling, generators)

    def feed(self, ids_B: Tensor) -> None:
        """Append one token per active row and compute the next logits; evicts when the interval is over."""
        cache, engine = self.cache, self.engine
        if self._room == 0:
            self._room = self._steps_per_round - self._since_eviction
            if self._planned > 0:  # a page for tokens that will not come could outgrow the pool, and recompile
                self._room = min(self._room, self._planned)
            cache.reserve(self._room)
        self._room, self._planned = self._room - 1, self._planned - 1
        pos_B = torch.where(self._active_B, cache.next_pos, -1)
        self.logits_BV = engine.decode(
            engine.model, ids_B[:, None], pos_B[:, None], cache.views(), cache.queries, cache.window, engine.backend
        )
        cache.next_pos += self._active_B
        self._since_eviction += 1
        if self._since_eviction == self._steps_per_round:
            self._since_eviction = 0
            if self._evicts_later:
                self.max_live = max(self.max_live, *(max(layer.lengths()) for layer in cache.layers))
                self.evictions += evict(engine.model, cache, self.policy, engine.grams, self.budgets)

    @property
    def _steps_per_round(self) -> int:
        """Tokens between two visits of the host: it evicts, or at least hands out pages."""
        interval = self.policy.interval if self._evicts_later else None
        return interval or self.cache.layers[0].pool.page

    @property
    def _evicts_later(self) -> bool:
        return self.policy.budget is not None and self.policy.interval is not None

    def fork(self) -> Session:
        """A session that goes on from here on its own; pages are shared until one of the two writes."""
        twin = copy.copy(self)
        twin.cache = self.cache.fork()
        self._room = twin._room = 0  # the page both would write to next is shared now
        twin.active, twin._active_B = list(self.active), self._active_B.clone()
        return twin

    def finish(self, row: int) -> None:
        """Stop a row: its cache stays as it is while the others go on."""
        self.active[row] = False
        self._active_B[row] = False

    def kept(self) -> list[list[float]]:
        """Live entries per KV head (mean over heads), one list per layer with one number per row."""
        return [layer.live_counts().double().mean(-1).tolist() for layer in self.cache.layers]

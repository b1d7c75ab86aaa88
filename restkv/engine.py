"""A model and the way its steps run: compiled or eager, and what happens where nothing compiles.

Letters: B batch rows, T new tokens, V vocabulary, E hidden width, K KV heads, D head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modeling.cache import KVCache
from modeling.compiled import compiled
from modeling.errors import CompileError, RestKVWarning
from modeling.forward import step
from modeling.layers import Decoder
from modeling.pages import LayerView
from modeling.sparse import sparse_attention
from restkv.errors import TooManyShapes
from restkv.kernels import check_compiler
from restkv.masking import evict
from restkv.phrases import Phrases
from restkv.pieces import Pieces
from restkv.policies.base import Policy
from restkv.roots import Roots
from restkv.sizing import Capacities, companions_of

# Graphs that torch.compile may make of the step. A server of one model and policy makes 2 (r s + s + log2 R) at most, for prompts
# and answers of up to P positions and R rows at once: r = 1 + log2 R, s = 2 + log2(P / 256). That is 116 for 131,072 positions
# and 8 rows. Other shapes go on with sdpa.
COMPILED_SHAPES = 128
# What several operations read is stored, not computed by each of them: inductor would make a norm anew for every row of the
# weights that it meets (a product of one row is a multiplication and a sum, and so fuses with whatever precedes it).
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"realize_reads_threshold": 1}


@dataclass
class Engine:
    """A model and the way its steps run; shared by all sessions of a process.

    Args:
        backend: "flex" (compiled) or "sdpa" (eager).
        phrases: what the model is asked to do with a prompt, for probes that ask.
        named: flex was asked for by name. Otherwise it gives way to sdpa, for good and with one warning, where nothing compiles.
    Raises (as `decode`, `hidden` and `attend` do):
        CompileError: flex was asked for by name and cannot be compiled; nothing has been computed.
    """

    model: Decoder
    backend: str
    named: bool = True
    phrases: Phrases = field(default_factory=Phrases)
    roots: Roots = field(init=False)

    def __post_init__(self) -> None:
        self.roots = Roots(self.model)
        self._remarked = False
        self._decode, self._hidden = (compiled(function, options=OPTIONS) for function in (_decode, step))
        self._evict = compiled(evict)
        self.capacities = Capacities()
        self.pieces = Pieces(self.backend == "flex")
        self._eager_policies: set[str] = set()  # by repr: a plugin's options may have no hash
        if self.backend == "flex":
            try:
                check_compiler(self.device)
                config = torch._dynamo.config
                config.recompile_limit = max(config.recompile_limit, COMPILED_SHAPES)
            except CompileError as error:
                self._give_way(error)

    def decode(self, *inputs: Any) -> Tensor:
        """_decode with this backend."""
        return self._run(self._decode, _decode, *inputs)

    def hidden(self, *inputs: Any) -> Tensor:
        """modeling.forward.step with this backend."""
        return self._run(self._hidden, step, *inputs)

    def attend(self, *inputs: Any, **how: Any) -> Tensor:
        """modeling.sparse.sparse_attention with this backend."""
        return self._run(sparse_attention, sparse_attention, *inputs, **how)

    def masks(self, policy: Policy) -> bool:
        """Whether evictions while decoding are one compiled graph, which moves nothing.

        Where ranks compare heads it is eager: how long lists are, and with it which graph they take, differs from rank to rank.
        """
        compiles = self.backend == "flex" and policy.traceable and repr(policy) not in self._eager_policies
        return compiles and not (self.model.ranks.size > 1 and policy.compares_heads)

    def evict(self, policy: Policy, *inputs: Any) -> Tensor | None:
        """masking.evict, compiled. None, with nothing done, where it cannot be: a policy evicts eagerly then, for good; a cache
        of one shape too many does so this time.
        """
        try:
            return self._evict(policy, *inputs, regions=True)
        except TooManyShapes:  # the policy's others go on compiled
            self._remark_shapes()
        except CompileError as error:
            warnings.warn(f"{error}. {policy.name} evicts eagerly from now on", RestKVWarning, stacklevel=3)
            self._eager_policies.add(repr(policy))
        return None

    def _run(
        self, compiling: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Any, **options: Any
    ) -> Tensor:
        if self.backend == "flex":
            try:
                return compiling(*inputs, **options, backend="flex")
            except TooManyShapes:
                self._remark_shapes()
                return eager(*inputs, **options, backend="sdpa")
            except CompileError as error:
                self._give_way(error)
        return eager(*inputs, **options, backend=self.backend)

    def _give_way(self, error: CompileError) -> None:
        if self.named:
            raise error
        self.backend, self.pieces.possible = "sdpa", False
        warnings.warn(f"{error}; going on with sdpa", RestKVWarning, stacklevel=2)

    def _remark_shapes(self) -> None:
        """Once: whatever has one of the compiled shapes runs compiled all the same."""
        if not self._remarked:
            self._remarked = True
            warnings.warn(
                f"caches of {torch._dynamo.config.recompile_limit} shapes have been compiled, as many as torch.compile allows "
                "here; those of other shapes go on with sdpa, which compiles nothing. Fewer policies and chunk sizes in a "
                "process make fewer shapes",
                RestKVWarning,
                stacklevel=3,
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(
        self,
        policy: Policy,
        rows: int,
        entries: int,
        queries: int,
        ragged: bool,
        shared: bool,
        forks: int,
        page: int,
        max_entries: int | None = None,
        filled: int | None = None,
        longest: int = 0,
    ) -> KVCache:
        """A cache with room for `entries` entries per layer, row and KV head.

        Args:
            queries: last queries to remember.
            ragged: heads may keep different numbers of entries.
            shared: layers too.
            forks: pages per list to have ready for forks.
            page: slots per page.
            max_entries, filled, longest: see KVCache.create.
        """
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
            page=page,
            ring_size=queries,
            companions=companions_of(policy, self.model),
            spare=int(ragged or shared) + forks,
            ragged=ragged,
            shared=shared,
            max_entries=max_entries,
            filled=filled,
            steps=1 if self.backend == "flex" else 4,
            longest=longest,
        )


def _decode(
    model: Decoder,
    ids_BT: Tensor,
    pos_BT: Tensor,
    lag_B: Tensor,
    views: list[LayerView],
    queries: list[Tensor],
    window: int,
    backend: str,
) -> Tensor:
    """Logits [B, V] float32 after the last real one of the T new tokens."""
    x_BTE = step(model, ids_BT, pos_BT, lag_B, views, queries, window, backend)
    last_B = (pos_BT >= 0).sum(-1).clamp(min=1) - 1
    return model.head(x_BTE[torch.arange(len(x_BTE), device=x_BTE.device), last_B])

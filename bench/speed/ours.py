"""The measured process of restkv itself: random weights in the shape asked for, or a checkpoint (see workers.py).

Letters: H query heads, K KV heads, L prompt length, W last queries, D head dim, X heads with a kept set of their own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bench.speed.workers import Worker, serve
from modeling.checkpoint.loading import load_model
from modeling.families.registry import config_from_dict
from modeling.layers import Decoder
from modeling.quant import quantise
from restkv.engine import Engine
from restkv.evict import Evictor
from restkv.reading import Layer
from restkv.saving.store import policy_from_dict
from restkv.session import Session

Result = TypeVar("Result")


class Laps:
    """Seconds, counted by all that share it."""

    seconds = 0.0


class TimedEvictor(Evictor):
    """Counts what a prefill spends on scoring, selecting and storing; on CUDA that waits for the device twice a layer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.laps = Laps()

    def store_prompt(self, *arguments: Any) -> None:
        self._timed(super().store_prompt, *arguments)

    def prompt_done(self, *arguments: Any) -> None:
        self._timed(super().prompt_done, *arguments)

    def round(self, *arguments: Any, **named: Any) -> bool:
        return self._timed(super().round, *arguments, **named)

    def _timed(self, work: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        self._wait()
        start = time.perf_counter()
        result = work(*arguments, **named)
        self._wait()
        self.laps.seconds += time.perf_counter() - start
        return result

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


class Ours(Worker):
    """Arguments (JSON): config (a config.json) or model (a folder), dtype, device, backend, policy (as
    restkv.saving.store writes it), prefill (see Session), tokens (to plan for), weights (see restkv.load)."""

    kind: ClassVar[type[Session]] = Session

    def __init__(self, arguments: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = arguments["device"]
        dtype = getattr(torch, arguments["dtype"])
        if arguments["model"]:
            model = load_model(arguments["model"], dtype=dtype, device=self.device, weights=arguments["weights"])
        else:
            with torch.device(self.device):
                model = Decoder(config_from_dict(arguments["config"])).to(dtype).eval().requires_grad_(False)
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
            if arguments["weights"] != "auto":
                quantise(model, arguments["weights"])
        self._engine = Engine(model, arguments["backend"])
        self._policy = policy_from_dict(arguments["policy"])
        self._tokens, self._prefill = arguments["tokens"], arguments["prefill"]
        self._session: Session | None = None
        self._evictor: TimedEvictor | None = None

    @torch.no_grad()
    def prefill(self, context: int, batch: int) -> None:
        prompts = torch.randint(0, self._engine.model.config.vocab_size, (batch, context)).tolist()
        session = self._open(context, batch, self._prefill)
        session.evictor = self._evictor = TimedEvictor(
            self._engine.model, self._policy, self._engine.roots, [context] * session.cache.rows
        )
        session.prefill(prompts)

    @torch.no_grad()
    def fill(self, context: int, batch: int) -> None:
        session = self._open(context, batch)
        for row in range(batch):
            self._store(row, context, self._layers(context))
        session.cache.refresh()
        session.logits_BV = torch.zeros(batch, self._engine.model.config.vocab_size, device=self._engine.device)

    def _open(self, context: int, batch: int, prefill: str = "dense") -> Session:
        """A session with an empty cache."""
        self._session = self._evictor = None  # the old cache goes before the new one comes
        self._session = self.kind(self._engine, self._policy, [context] * batch, self._tokens, prefill=prefill)
        return self._session

    def _layers(self, context: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Random queries [H, W, D], keys and values [K, L, D] of every layer's prompt: the queries that an eviction looks at."""
        assert self._session is not None
        config = self._engine.model.config
        observed = min(context, max(self._policy.observed_prompt, self._session.cache.ring_size, 1))
        for _ in range(config.num_layers):
            k_KLD, v_KLD = (self._random(config.num_kv_heads, context) for _ in range(2))
            yield self._random(config.num_heads, observed), k_KLD, v_KLD

    def _random(self, heads: int, length: int) -> Tensor:
        model = self._engine.model
        return torch.randn(heads, length, model.config.head_dim, device=model.device).to(model.dtype)

    def _store(self, row: int, context: int, layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """What a prefill does with the keys and values of a row: scoring, selecting, storing."""
        assert self._session is not None
        cache, evictor = self._session.cache.row(row), self._session.evictor.row(row)
        for layer, (q_HWD, k_KLD, v_KLD) in enumerate(layers):
            _, mass_XL = evictor.watch_prompt(layer, context)
            raw_KLD = k_KLD if self._policy.slot_positions else None
            evictor.store_prompt(cache, layer, Layer(q_HWD, k_KLD, v_KLD, raw_KLD), mass_XL)
        evictor.prompt_done(cache, context)

    def drop(self) -> None:
        self._session = self._evictor = None

    @torch.no_grad()
    def decode(self) -> None:
        assert self._session is not None
        self._session.feed(self._session.logits_BV.argmax(-1))

    def describe(self) -> dict[str, Any]:
        if self._session is None:
            return {}
        kept = [row[0] for row in self._session.kept()]
        cache_bytes = self._session.cache.allocated_bytes
        return {
            "kept": sum(kept) / len(kept),
            "cache_bytes": cache_bytes,
            "period": self._session.schedule.period,
            "evicting_s": None if self._evictor is None else self._evictor.laps.seconds,
        }


if __name__ == "__main__":
    serve(Ours(json.loads(sys.argv[1])))

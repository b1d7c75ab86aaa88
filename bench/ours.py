"""The measured process of restkv itself: random weights in the shape asked for (see workers.py)."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bench.workers import Worker, serve
from modeling.families import config_from_dict
from modeling.layers import Decoder
from restkv.generate import Engine, Session
from restkv.policies import get_policy


class Ours(Worker):
    """Arguments (JSON): config (a config.json), dtype, backend, method, options (of the policy), tokens (to plan for)."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, arguments["dtype"])
        model = Decoder(config_from_dict(arguments["config"])).to(dtype).eval().requires_grad_(False)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
        self._engine = Engine(model, arguments["backend"])
        self._policy = get_policy(arguments["method"], **arguments["options"])
        self._tokens = arguments["tokens"]
        self._session: Session | None = None

    @torch.no_grad()
    def prefill(self, context: int) -> None:
        self._session = None  # the old cache goes before the new one comes
        ids = torch.randint(0, self._engine.model.config.vocab_size, (context,)).tolist()
        self._session = Session(self._engine, self._policy, [context], self._tokens)
        self._session.prefill([ids])

    @torch.no_grad()
    def decode(self) -> None:
        assert self._session is not None
        self._session.feed(self._session.logits_BV.argmax(-1))

    def describe(self) -> dict[str, Any]:
        assert self._session is not None
        kept = [row[0] for row in self._session.kept()]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return {"kept": sum(kept) / len(kept), "cache_bytes": self._session.cache.allocated_bytes, "graphs": graphs}


if __name__ == "__main__":
    serve(Ours(json.loads(sys.argv[1])))

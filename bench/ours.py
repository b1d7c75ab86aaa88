"""The measured process of restkv itself: random weights in the shape asked for, or a checkpoint (see workers.py)."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bench.workers import Worker, serve
from modeling.families import config_from_dict
from modeling.layers import Decoder
from modeling.loading import load_model
from restkv.generate import Engine, Session
from restkv.store import policy_from_dict


class Ours(Worker):
    """Arguments (JSON): config (a config.json) or model (a folder), dtype, device, backend, policy (as
    restkv.store writes it), tokens (to plan for)."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = arguments["device"]
        dtype = getattr(torch, arguments["dtype"])
        if arguments["model"]:
            model = load_model(arguments["model"], dtype=dtype, device=self.device)
        else:
            with torch.device(self.device):
                model = Decoder(config_from_dict(arguments["config"])).to(dtype).eval().requires_grad_(False)
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
        self._engine = Engine(model, arguments["backend"])
        self._policy = policy_from_dict(arguments["policy"])
        self._tokens = arguments["tokens"]
        self._session: Session | None = None

    @torch.no_grad()
    def prefill(self, context: int, batch: int) -> None:
        self._session = None  # the old cache goes before the new one comes
        prompts = torch.randint(0, self._engine.model.config.vocab_size, (batch, context)).tolist()
        self._session = Session(self._engine, self._policy, [context] * batch, self._tokens)
        self._session.prefill(prompts)

    @torch.no_grad()
    def decode(self) -> None:
        assert self._session is not None
        self._session.feed(self._session.logits_BV.argmax(-1))

    def describe(self) -> dict[str, Any]:
        assert self._session is not None
        kept = [row[0] for row in self._session.kept()]
        return {"kept": sum(kept) / len(kept), "cache_bytes": self._session.cache.allocated_bytes}


if __name__ == "__main__":
    serve(Ours(json.loads(sys.argv[1])))

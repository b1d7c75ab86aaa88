"""The measured process of Hugging Face transformers: SDPA attention, DynamicCache, greedy (see bench/workers.py)."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bench.workers import Worker, serve


class Transformers(Worker):
    """Arguments (JSON): config (a config.json), dtype."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        torch.manual_seed(0)
        raw = dict(arguments["config"])
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        dtype = getattr(torch, arguments["dtype"])
        self._model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self._cache = DynamicCache()
        self._next_11 = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def prefill(self, context: int) -> None:
        self._cache = DynamicCache()
        ids_1L = torch.randint(0, self._model.config.vocab_size, (1, context))
        self._run(ids_1L)

    @torch.no_grad()
    def decode(self) -> None:
        self._run(self._next_11)

    def _run(self, ids_1T: torch.Tensor) -> None:
        out = self._model(ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next_11 = out.logits[:, -1:].argmax(-1)

    def describe(self) -> dict[str, Any]:
        layers: list[Any] = list(self._cache.layers)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return {"kept": self._cache.get_seq_length(), "cache_bytes": cache_bytes}


if __name__ == "__main__":
    serve(Transformers(json.loads(sys.argv[1])))

"""The measured process of Hugging Face transformers and kvpress: SDPA attention, greedy (bench/speed/workers.py)."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from bench.speed.workers import Worker, serve


class Transformers(Worker):
    """Arguments (JSON): config (a config.json) or model (a folder), dtype, device, cache ("dynamic" or "static"), tokens (to
    plan for), press (None, or a class of kvpress with its options but the ratio), budget (entries the press shall keep).

    The static cache is decoded from by a compiled model, as transformers' own generate does. A press compresses a dynamic one
    after each layer's prefill, and later tokens are told their true positions, as kvpress's pipeline does.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = arguments["device"]
        self._arguments = arguments
        dtype, attention = getattr(torch, arguments["dtype"]), "sdpa"
        if arguments["model"]:
            model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=dtype, attn_implementation=attention)
        else:
            raw = dict(arguments["config"])
            config = AutoConfig.for_model(raw.pop("model_type"), **raw)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        self._model = model.eval().to(self.device)
        self._static = arguments["cache"] == "static"
        self._step: Any = torch.compile(self._model, fullgraph=False, dynamic=False) if self._static else self._model
        self._cache: Any = None
        named = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"  # before transformers 5.24
        self._next_B1 = torch.zeros(1, 1, dtype=torch.long)
        self._seen = 0

    @torch.no_grad()
    def prefill(self, context: int, batch: int) -> None:
        self._cache = None
        if self._static:
            most = context + self._arguments["tokens"]
            self._cache = StaticCache(config=self._model.config, max_cache_len=most)
        else:
            self._cache = DynamicCache()
        ids_BL = torch.randint(0, self._model.config.vocab_size, (batch, context), device=self.device)
        with self._press(context):
            self._run(self._model, ids_BL, 0)
        self._seen = context

    @torch.no_grad()
    def fill(self, context: int, batch: int) -> None:
        if self._static:
            raise ValueError("a static cache is not filled: measure it with its prompts run")
        self._cache = DynamicCache()
        config = self._model.config
        kept = context if self._arguments["press"] is None else min(context, self._arguments["budget"])
        shape = (batch, config.num_key_value_heads, kept, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k_BKCD, v_BKCD = (torch.randn(shape, device=self.device).to(self._model.dtype) for _ in range(2))
            self._cache.update(k_BKCD, v_BKCD, layer)
        self._next_B1 = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._seen = context

    def _press(self, context: int) -> Any:
        if self._arguments["press"] is None:
            return contextlib.nullcontext()
        import kvpress

        name, options = self._arguments["press"]
        ratio = max(0.0, 1 - self._arguments["budget"] / context)
        return getattr(kvpress, name)(compression_ratio=ratio, **options)(self._model)

    def drop(self) -> None:
        self._cache = None

    @torch.no_grad()
    def decode(self) -> None:
        self._run(self._step, self._next_B1, self._seen)
        if self._static and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            sys.exit(
                "transformers-static is measured compiled, and torch's compiler is off (TORCHDYNAMO_DISABLE, perhaps)"
            )
        self._seen += 1

    def _run(self, step: Any, ids_BT: torch.Tensor, first: int) -> None:
        pos_1T = torch.arange(first, first + ids_BT.shape[1], device=self.device)[None]
        more: dict[str, Any] = {"cache_position": pos_1T[0]} if self._static else {}
        more[self._cache_name] = self._cache
        out = step(ids_BT, position_ids=pos_1T, use_cache=True, logits_to_keep=1, **more)
        self._next_B1 = out.logits[:, -1:].argmax(-1)

    def describe(self) -> dict[str, Any]:
        if self._cache is None:
            return {}
        layers: list[Any] = list(self._cache.layers)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        kept = self._seen if self._static else layers[0].keys.shape[2]
        return {"kept": kept, "cache_bytes": cache_bytes}


if __name__ == "__main__":
    serve(Transformers(json.loads(sys.argv[1])))

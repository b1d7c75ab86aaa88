"""LM: text in, text out. `load` makes one from a Hugging Face checkpoint folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from modeling.checkpoint.loading import load_model, resolve
from modeling.config import DTYPES
from modeling.errors import RestKVWarning
from modeling.layers import Decoder
from modeling.modes import own_modes
from modeling.nonfinite import numeric_error, sound
from modeling.quant import WEIGHTS
from modeling.ranks import ALONE, Ranks, join, local_device
from modeling.room import enough_memory
from modeling.text.tokenizer import Tokenizer
from restkv.answering import Answering, Prompt, listed
from restkv.context import CompressedContext
from restkv.errors import PromptError
from restkv.meter import Meter
from restkv.patterns import Pattern
from restkv.policies import FullCache, Policy, default_policy
from restkv.policies.base import require_policy
from restkv.prefill import Progress, dense_hidden
from restkv.results import Decoding, Generation, Stats, TextStream
from restkv.session import CHUNK, Session

BURST = 8  # tokens that a GPU makes before the host reads them
LEAST_HEAD_DIM = 16  # of FlexAttention on CUDA


@own_modes
def load(
    path_or_name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    check_weights: bool = False,
    progress: Progress | None = None,
    weights: str = "auto",
    parallel: str = "none",
) -> LM:
    """Load a Hugging Face checkpoint folder (or download one by name with the `hub` extra).

    Args:
        path_or_name: a folder with config.json, safetensors and tokenizer.json, or "org/name" or "org/name@revision", where
            a revision is a branch, a tag or a commit.
        device: "auto" takes CUDA when there is one.
        dtype: "auto" takes the checkpoint's; else "float32", "bfloat16", "float16" or a torch dtype.
        backend: "flex" (FlexAttention, compiled), "sdpa" (eager) or "auto": sdpa on CPU; on CUDA flex, or sdpa with one warning
            where torch cannot compile.
        check_weights: look for NaN and infinity in the weights and name the tensors that hold them.
        progress: called with the bytes of weights that are there and those in all.
        weights: "int8" or "int4" holds the matrices, embedding and output matrix among them, in 8 or 4 bits a number, made while
            loading; norms, biases, the cache and all that is computed stay in `dtype` (docs/quantised-weights.md). "auto" holds
            them as the checkpoint does, which `restkv quantize` may have made.
        parallel: "none", or "tensor": torchrun's processes share the model by KV head (docs/parallel.md).
            Every process then makes the same calls in the same order, and gets the same answers.
    Raises:
        CheckpointError, ConfigError, TokenizerError: one line that names the file, the value and the mend.
        CompileError: flex is asked for by name, and torch cannot compile (`generate` and all else may raise it too).
        TooLargeError: there is not enough memory for the weights.
        ParallelError: the ranks do not meet, or the model's KV heads do not divide among them.
    """
    where, ranks = _place(device, parallel)
    folder = resolve(path_or_name)
    if weights not in ("auto", *WEIGHTS):
        raise PromptError(f"weights {weights!r} are not known; give auto, {', '.join(WEIGHTS)}")
    model = load_model(
        folder,
        dtype=_dtype(dtype),
        device=where,
        check_weights=check_weights,
        progress=progress,
        weights=weights,
        ranks=ranks,
    )
    chosen = _backend(backend, where, model.config.head_dim)
    return LM(model, Tokenizer.from_folder(folder), chosen, named=backend != "auto")


def _place(device: str | torch.device, parallel: str) -> tuple[torch.device, Ranks]:
    """Where this process's part of the model lives, and whom it shares the model with."""
    if parallel not in ("none", "tensor"):
        raise PromptError(f"parallel {parallel!r} is not known; give none or tensor")
    if parallel == "none":
        return _device(device), ALONE
    where = local_device() if str(device) in ("auto", "cuda") and torch.cuda.is_available() else _device(device)
    return where, join(where)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError):  # unknown to this build of torch, or not in this machine
        raise PromptError(f"device {str(device)!r} is not available here; give auto, cpu, or a cuda device") from None
    return where


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PromptError(f"dtype {dtype!r} is not known; give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _backend(backend: str, device: torch.device, head_dim: int) -> str:
    if backend not in ("auto", "flex", "sdpa"):
        raise PromptError(f"backend {backend!r} is not known; give auto, flex or sdpa")
    possible = device.type != "cuda" or head_dim >= LEAST_HEAD_DIM
    if backend == "auto":
        return "flex" if device.type == "cuda" and possible else "sdpa"
    if backend == "flex" and not possible:
        raise PromptError(
            f"head_dim {head_dim}: FlexAttention on CUDA takes {LEAST_HEAD_DIM} and more; load with backend='sdpa'"
        )
    return backend


class LM(Answering):
    """A loaded model with its tokenizer: generate text, stream it, or look at logits and log-probabilities."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, backend: str = "sdpa", named: bool = True) -> None:
        super().__init__(model, tokenizer, backend, named)
        self._burst = 1 if self.device.type == "cpu" else BURST

    # -- generation

    @overload
    def generate(self, prompts: str | Sequence[int], policy: Policy | None = None, **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], policy: Policy | None = None, **options: Any
    ) -> list[Generation]: ...
    def generate(self, prompts: Any, policy: Policy | None = None, **options: Any) -> Generation | list[Generation]:
        """Continue one prompt, or a batch of ragged ones.

        Args:
            prompts: a string, token ids (a list, a tensor or an array of whole numbers), or a list of either (then a list
                comes back, in the same order).
            policy: what to keep of the cache; get_policy("restkv", "draft", budget=1024) when none is given: the prompt's own
                queries and eight drafted tokens say what an answer will need (docs/probes.md), and the full cache is alive until
                these are made. With prefill="chunked" its probe is "window".
            options: the fields of Decoding (max_new_tokens, temperature, stop, ...); prefill ("dense", "chunked" or a sparse
                pattern) and chunk (see Session); progress (called with what is done and what there is in all: layers, or
                tokens of a chunked prefill).
        Returns:
            Generation: text, tokens (the new ids), finish_reason and stats; rows of a batch share the stats object.
        Raises:
            PromptError: empty prompt, neither text nor token ids, token id out of range, impossible sampling value.
            PolicyError: protected entries exceed the budget, or the policy is none.
            NumericError: the model's logits are no numbers; the line says which layer made the first.
            TooLargeError: there is not enough memory; the line names the numbers to lower.
        """
        prompts = listed(prompts)
        single = isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) == 0
        single = single or isinstance(prompts[0], Integral)
        results: list[Generation] = []
        for _ in self._run([prompts] if single else list(prompts), policy, results, **options):
            pass
        return results[0] if single else results

    def stream(self, prompt: Prompt, policy: Policy | None = None, **options: Any) -> TextStream:
        """Like `generate` for one prompt, yielding pieces of text as they are made; `.generation` holds the result."""
        results: list[Generation] = []
        return TextStream(self._run([prompt], policy, results, **options), results)

    @own_modes
    def _run(
        self,
        prompts: Sequence[Prompt],
        policy: Policy | None,
        results: list[Generation],
        *,
        prefill: str | Pattern = "dense",
        chunk: int = CHUNK,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text); fill `results` at the end."""
        policy = default_policy("draft", prefill) if policy is None else require_policy(policy)
        decoding = Decoding(**options)
        ids = [self.encode(prompt) for prompt in prompts]
        self._remark(ids, policy, decoding.max_new_tokens)
        stats = Stats(policy.name, policy.budget, [len(row) for row in ids])
        meter = Meter(self.device)
        session = Session(
            self.engine, policy, stats.prompt_tokens, decoding.max_new_tokens, prefill=prefill, chunk=chunk
        )
        session.prefill(ids, progress)
        yield from self.decode(session, decoding, stats, meter, results, burst=self._burst)

    def _remark(self, ids: Sequence[Sequence[int]], policy: Policy, max_new_tokens: int) -> None:
        """Warn of what works but may surprise."""
        longest, shortest = max(map(len, ids)), min(map(len, ids))
        if longest + max_new_tokens > self.config.max_positions:
            warnings.warn(
                f"prompt of {longest} tokens plus {max_new_tokens} new ones exceeds the model's {self.config.max_positions} "
                "positions; the text may degrade",
                RestKVWarning,
                stacklevel=4,
            )
        evicts = policy.budget is not None and policy.budget_for(longest) < longest + max_new_tokens
        if evicts and policy.window > shortest:
            warnings.warn(
                f"window {policy.window} is longer than the prompt of {shortest} tokens; it shrinks to the prompt",
                RestKVWarning,
                stacklevel=4,
            )

    @own_modes
    def compress(
        self,
        context: Prompt,
        policy: Policy | None = None,
        *,
        prefill: str | Pattern = "dense",
        chunk: int = CHUNK,
    ) -> CompressedContext:
        """Prefill a text and keep what the policy keeps of it, to be asked many questions (query-agnostic).

        Args:
            context: text or token ids.
            policy: get_policy("restkv", "replay", budget=1024, refit="both") when none is given: the text is read twice, and what
                is kept is fitted to what the second reading looks at, which keeps the answers to questions that are not known yet
                (docs/refit.md). With prefill="chunked" the last queries are observed, and nothing is fitted; nor is it with flex.
            prefill, chunk: see Session.
        """
        if policy is None:
            refit = "none" if str(prefill) == "chunked" or self.compiled else "both"
            policy = default_policy("replay", prefill, refit=refit)
        ids = self.encode(context)
        session = Session(self.engine, policy, [len(ids)], chunk, prefill=prefill, chunk=chunk, extends=True, forks=1)
        session.prefill([ids])
        return CompressedContext(self, session, len(ids))

    # -- logits and log-probabilities

    @own_modes
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [L, V] float32 at every position of `ids` (L token ids), with the full cache.

        Raises:
            NumericError: some of them are no numbers.
            TooLargeError: there is not enough memory for them.
        """
        ids = self.encode(ids)
        with enough_memory(f"make logits at {len(ids)} places", "give fewer tokens"):
            logits_LV = self.model.head(dense_hidden(self.model, ids))
        if not sound(logits_LV).all():  # sync: once
            raise numeric_error(self.model, ids)
        return logits_LV

    @own_modes
    def logprobs(self, context: Prompt, continuations: Sequence[Prompt], policy: Policy | None = None) -> list[float]:
        """Summed log-probability (nats) of each continuation after the context.

        The context is prefilled and evicted under `policy` (full cache when none); every continuation is then teacher-forced
        on its own fork of that cache, with decode-time eviction where the policy has an interval. A continuation given as text
        is encoded without a BOS.
        """
        policy = FullCache() if policy is None else policy
        ids, targets = self.encode(context), self._targets(continuations)
        session = Session(self.engine, policy, [len(ids)], max(map(len, targets), default=1), forks=1)
        session.prefill([ids])
        return self.score(session, targets)

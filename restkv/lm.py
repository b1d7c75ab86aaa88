"""LM: text in, text out. `load` makes one from a Hugging Face checkpoint folder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from modeling.errors import RestKVWarning
from modeling.layers import Decoder
from modeling.loading import load_model, resolve
from modeling.tokenizer import Stream, Tokenizer
from restkv.errors import PromptError
from restkv.generate import CHUNK, Engine, Session
from restkv.memory import PeakMemory
from restkv.policies import FullCache, Policy, ReSTKV
from restkv.prefill import Progress, dense_hidden
from restkv.sampling import Sampling

Prompt = str | Sequence[int]


@dataclass
class Stats:
    """What a generation cost; every figure is measured.

    Attributes:
        method, budget: the policy's name and budget as given (None: no budget).
        prompt_tokens, new_tokens: per row.
        ttft_s: seconds from the call to the first token of the last row to start (prefill of all rows, eviction, first sample).
        tpot_s: median seconds per decode step after the first token, all rows together; 0 when there was none.
        tokens_per_s: new tokens after the first, of all rows, per second of decoding.
        seen: entries a full cache would hold per KV head at the end, per row.
        kept: per layer, per row: live entries per KV head (mean over heads) at the end.
        max_kept: the largest number of live entries any KV head of any layer held when it was looked at (each eviction, end).
        live_bytes, allocated_bytes, full_bytes: cache bytes of live entries, of pages held, and of a full cache, at the end.
        peak_bytes: peak memory of the process (CPU) or the allocator (CUDA) during the call, weights included.
        evictions: decode-time evictions.
        graphs: graphs torch.compile made during the call.
    """

    method: str
    budget: int | float | tuple[int, ...] | None
    prompt_tokens: list[int]
    new_tokens: list[int] = field(default_factory=list)
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    tokens_per_s: float = 0.0
    seen: list[int] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)
    max_kept: int = 0
    live_bytes: int = 0
    allocated_bytes: int = 0
    full_bytes: int = 0
    peak_bytes: int = 0
    evictions: int = 0
    graphs: int = 0

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Generation:
    """One row's answer: text, its new token ids, why it ended ("eos", "stop" or "length"), and the call's stats."""

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats


class TextStream:
    """Iterator over the pieces of one row's text; `.generation` is there once it is exhausted."""

    def __init__(self, pieces: Iterator[tuple[int, str]], results: list[Generation]) -> None:
        self._pieces, self._results = pieces, results

    def __iter__(self) -> Iterator[str]:
        for _, piece in self._pieces:
            yield piece

    @property
    def generation(self) -> Generation:
        if not self._results:
            raise RuntimeError("the stream has not ended yet: iterate over it first, then read .generation")
        return self._results[0]


def load(
    path_or_name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    compile: str | bool = "auto",
    check_weights: bool = False,
) -> LM:
    """Load a Hugging Face checkpoint folder (or download one by name with the `hub` extra).

    Args:
        path_or_name: a folder with config.json, safetensors and tokenizer.json, or "org/name".
        device: "auto" takes CUDA when there is one.
        dtype: "auto" takes the checkpoint's; else "float32", "bfloat16", "float16" or a torch dtype.
        backend: "flex" (FlexAttention, compiled), "sdpa" (eager) or "auto": flex on CUDA, sdpa on CPU.
        compile: True asks for flex, False for sdpa; "auto" follows the backend.
        check_weights: look for NaN and infinity in the weights and name the tensors that hold them.
    Raises:
        CheckpointError, ConfigError, TokenizerError: one line that names the file, the value and the mend.
    """
    folder = resolve(path_or_name)
    where = _device(device)
    model = load_model(folder, dtype=_dtype(dtype), device=where, check_weights=check_weights)
    return LM(model, Tokenizer.from_folder(folder), backend=_backend(backend, compile, where))


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
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise PromptError(f"dtype {dtype!r} is not known; give auto, {', '.join(names)}")
    return names[dtype]


def _backend(backend: str, compile: str | bool, device: torch.device) -> str:
    if backend not in ("auto", "flex", "sdpa"):
        raise PromptError(f"backend {backend!r} is not known; give auto, flex or sdpa")
    if backend == "auto":
        flex = device.type == "cuda" if compile == "auto" else bool(compile)
        return "flex" if flex else "sdpa"
    if compile != "auto" and bool(compile) != (backend == "flex"):
        raise PromptError(
            f"backend {backend!r} with compile={compile}: flex is always compiled and sdpa never; drop one of the two"
        )
    return backend


class LM:
    """A loaded model with its tokenizer: generate text, stream it, or look at logits and log-probabilities.

    Attributes: model, config, tokenizer, device, dtype, backend, compiled.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, backend: str = "sdpa") -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config
        self.engine = Engine(model, backend)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def backend(self) -> str:
        return self.engine.backend

    @property
    def compiled(self) -> bool:
        return self.backend == "flex"

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
            prompts: a string, a list of token ids, or a list of either (then a list comes back, in the same order).
            policy: what to keep of the cache; ReSTKV(budget=1024) when none is given.
            options: max_new_tokens (128), temperature (0: greedy), top_k, top_p, min_p, seed (see Sampling), stop (strings that
                end the text, themselves left out), ignore_eos (False), prefill ("dense" or "chunked") and chunk (see Session),
                progress (called with what is done and what there is in all: layers, or tokens of a chunked prefill).
        Returns:
            Generation: text, tokens (the new ids), finish_reason and stats; rows of a batch share the stats object.
        Raises:
            PromptError: empty prompt, token id out of range, impossible sampling value.
            PolicyError: protected entries exceed the budget.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)) or len(prompts) == 0
        results: list[Generation] = []
        for _ in self._run([prompts] if single else list(prompts), policy, results, **options):
            pass
        return results[0] if single else results

    def stream(self, prompt: Prompt, policy: Policy | None = None, **options: Any) -> TextStream:
        """Like `generate` for one prompt, yielding pieces of text as they are made; `.generation` holds the result."""
        results: list[Generation] = []
        return TextStream(self._run([prompt], policy, results, **options), results)

    @torch.no_grad()
    def _run(
        self,
        prompts: Sequence[Prompt],
        policy: Policy | None,
        results: list[Generation],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        prefill: str = "dense",
        chunk: int = CHUNK,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Yield (row, piece of text); fill `results` at the end."""
        policy = ReSTKV(budget=1024) if policy is None else policy
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens={max_new_tokens} makes nothing; give at least 1")
        ids = [self.encode(prompt) for prompt in prompts]
        self._remark(ids, policy, max_new_tokens)
        stats = Stats(policy.name, policy.budget, [len(row) for row in ids])
        peak = PeakMemory(self.device)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        started = time.perf_counter()
        session = Session(self.engine, policy, stats.prompt_tokens, max_new_tokens, prefill=prefill, chunk=chunk)
        session.prefill(ids, progress)
        rows = [
            _Row(self.tokenizer, stop, () if ignore_eos else self.config.eos_token_ids, max_new_tokens) for _ in ids
        ]
        generators = sampling.generators(len(ids))
        ids_B = session.sample(sampling, generators)
        laps: list[float] = []
        lap = 0.0
        while True:
            tokens = ids_B.tolist()  # sync: the text goes out token by token
            now = time.perf_counter()
            if not laps and not stats.ttft_s:
                stats.ttft_s = now - started
            else:
                laps.append(now - lap)
            lap = now
            for index, row in enumerate(rows):
                if session.active[index]:
                    piece = row.push(tokens[index])
                    if row.reason:
                        session.finish(index)
                    if piece:
                        yield index, piece
            if not any(session.active):
                break
            session.feed(ids_B)
            ids_B = session.sample(sampling, generators)
        self._finish(stats, session, rows, laps)
        stats.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        stats.peak_bytes = peak.bytes()
        results.extend(Generation(row.text, row.tokens, row.reason, stats) for row in rows)

    def _finish(self, stats: Stats, session: Session, rows: list[_Row], laps: list[float]) -> None:
        cache = session.cache
        stats.new_tokens = [len(row.tokens) for row in rows]
        if laps:
            stats.tpot_s = sorted(laps)[len(laps) // 2]
            stats.tokens_per_s = (sum(stats.new_tokens) - len(rows)) / sum(laps)
        stats.seen = cache.next_pos.tolist()  # sync: once, at the end
        stats.kept = session.kept()
        stats.max_kept = max(session.max_live, *(int(layer.live_counts().max()) for layer in cache.layers))
        stats.live_bytes, stats.allocated_bytes = cache.live_bytes, cache.allocated_bytes
        stats.full_bytes = sum(stats.seen) * self.config.kv_bytes_per_token(self.dtype)
        stats.evictions = session.evictions

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

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, all of them in the vocabulary (a tokenizer may know more words than the model)."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("this model has no tokenizer; give token ids instead of text")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        for index, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise PromptError(
                    f"token id {token} at place {index} of the prompt is outside the vocabulary of "
                    f"{self.config.vocab_size}"
                )
        if not ids or (isinstance(prompt, str) and not prompt):
            raise PromptError("the prompt is empty; give at least one token")
        return ids

    # -- logits and log-probabilities

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [L, V] float32 at every position of `ids` (L token ids), with the full cache."""
        return self.model.head(dense_hidden(self.model, self.encode(ids), self.device))

    @torch.no_grad()
    def logprobs(self, context: Prompt, continuations: Sequence[Prompt], policy: Policy | None = None) -> list[float]:
        """Summed log-probability (nats) of each continuation after the context.

        The context is prefilled and evicted under `policy` (full cache when none); every continuation is then teacher-forced
        on its own fork of that cache, with decode-time eviction where the policy has an interval. A continuation given as text
        is encoded without a BOS.
        """
        policy = FullCache() if policy is None else policy
        ids = self.encode(context)
        targets = [self._encode_continuation(text) for text in continuations]
        session = Session(self.engine, policy, [len(ids)], max(map(len, targets), default=1))
        session.prefill([ids])
        sums = []
        for target in targets:
            fork = session.fork()
            total = 0.0
            for index, token in enumerate(target):
                total += float(fork.logits_BV[0].log_softmax(-1)[token])  # sync: a score is a number
                if index + 1 < len(target):
                    fork.feed(torch.tensor([token], device=self.device))
            fork.cache.free()
            sums.append(total)
        return sums

    def _encode_continuation(self, continuation: Prompt) -> list[int]:
        if isinstance(continuation, str):
            if self.tokenizer is None:
                raise PromptError("this model has no tokenizer; give token ids instead of text")
            return self.encode(self.tokenizer.encode(continuation, bos=False))
        return self.encode(continuation)


class _Row:
    """One row's tokens and text as they come: end-of-sequence ids, stop strings, length."""

    def __init__(self, tokenizer: Tokenizer | None, stop: str | Sequence[str], eos: Sequence[int], limit: int) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reason = ""
        self._stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        self._eos, self._limit = frozenset(eos), limit
        self._held = ""  # text that may turn out to be the start of a stop string
        self._decoder = Stream(tokenizer) if tokenizer is not None else None

    def push(self, token: int) -> str:
        """Take one token; returns the text that is now certain."""
        self.tokens.append(token)
        if token in self._eos:
            self.reason = "eos"
        elif len(self.tokens) == self._limit:
            self.reason = "length"
        if self._decoder is None:
            return ""
        if self.reason != "eos":
            self._held += self._decoder.push(token)
        if self.reason:
            self._held += self._decoder.flush()
        return self._release()

    def _release(self) -> str:
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.reason, piece, self._held = "stop", self._held[: min(ends)], ""
        else:
            hold = 0 if self.reason else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - hold
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

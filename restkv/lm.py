"""LM: text in, text out. `load` makes one from a Hugging Face checkpoint folder."""

from __future__ import annotations

import math
import time
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
from modeling.room import enough_memory
from modeling.text.tokenizer import Tokenizer
from restkv.context import CompressedContext
from restkv.errors import PromptError
from restkv.generate import BROKEN, CHUNK, Engine, Session
from restkv.meter import Meter
from restkv.patterns import Pattern
from restkv.policies import FullCache, Policy, ReSTKV
from restkv.policies.base import require_policy
from restkv.prefill import Progress, dense_hidden
from restkv.results import Decoding, Generation, Row, Stats, TextStream

Prompt = str | Sequence[int]
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
    Raises:
        CheckpointError, ConfigError, TokenizerError: one line that names the file, the value and the mend.
        CompileError: flex is asked for by name, and torch cannot compile (`generate` and all else may raise it too).
        TooLargeError: there is not enough memory for the weights.
    """
    folder = resolve(path_or_name)
    where = _device(device)
    model = load_model(folder, dtype=_dtype(dtype), device=where, check_weights=check_weights, progress=progress)
    chosen = _backend(backend, where, model.config.head_dim)
    return LM(model, Tokenizer.from_folder(folder), chosen, named=backend != "auto")


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


class LM:
    """A loaded model with its tokenizer: generate text, stream it, or look at logits and log-probabilities.

    Attributes: model, config, tokenizer, device, dtype, backend, compiled.

    Args:
        named: see Engine.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, backend: str = "sdpa", named: bool = True) -> None:
        self.model, self._tokenizer = model, tokenizer
        self.config = model.config
        self.engine = Engine(model, backend, named)
        self._burst = 1 if self.device.type == "cpu" else BURST

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's.

        Raises:
            PromptError: an LM made of a model alone has none.
        """
        if self._tokenizer is None:
            raise PromptError("this model has no tokenizer; give token ids instead of text")
        return self._tokenizer

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
            prompts: a string, token ids (a list, a tensor or an array of whole numbers), or a list of either (then a list
                comes back, in the same order).
            policy: what to keep of the cache; ReSTKV(budget=1024) when none is given.
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
        prompts = _listed(prompts)
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
        policy = ReSTKV(budget=1024) if policy is None else require_policy(policy)
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

    @own_modes
    def decode(
        self,
        session: Session,
        decoding: Decoding,
        stats: Stats,
        meter: Meter,
        results: list[Generation],
        rows: Sequence[Row] = (),
        burst: int = 1,
    ) -> Iterator[tuple[int, str]]:
        """Draw every row's answer from a session that holds its prompt: (row, piece of text); fills `stats`, `results`.

        Args:
            rows: gather the answers, so that whoever made them has also those that are broken off.
            burst: tokens to draw before any of them is read, so that a GPU is waited for once in so many; more than 1 only for a
                session that nobody goes on with when the answer is broken off.
        """
        rows = rows or [self.answer(decoding) for _ in session.active]
        generators = decoding.sampling.generators(len(rows))
        ends_E = torch.tensor([] if decoding.ignore_eos else self.config.eos_token_ids, device=self.device)
        laps: list[float] = []
        lap, left = 0.0, decoding.max_new_tokens
        while True:
            ahead = stats.ttft_s > 0 and not decoding.stops  # a stop string is seen in the text alone
            most = min(burst, left) if ahead else 1
            drawn_NB = session.draw(most, decoding.sampling, generators, ends_E)
            last_B = session.drawn_B
            assert last_B is not None
            tokens_NB = drawn_NB.tolist()  # sync: once per burst; a row that has ended is not fed
            left -= len(tokens_NB)
            if not stats.ttft_s:
                stats.ttft_s = meter.seconds()
            else:
                laps += [(time.perf_counter() - lap) / len(tokens_NB)] * len(tokens_NB)
            for index, token in (pair for tokens_B in tokens_NB for pair in enumerate(tokens_B)):
                if session.active[index]:
                    row = rows[index]
                    if token == BROKEN:
                        raise session.numeric_error(index, row.tokens)
                    piece = row.push(token)
                    if row.reason:
                        session.finish(index)
                    if piece:
                        yield index, piece
            if not any(session.active):
                break
            lap = time.perf_counter()
            session.feed(last_B)
        stats.new_tokens = [len(row.tokens) for row in rows]
        if laps:
            stats.tpot_s = sorted(laps)[len(laps) // 2]
            stats.tokens_per_s = (sum(stats.new_tokens) - len(rows)) / sum(laps)
        self.measure(session, stats)
        stats.graphs, stats.peak_bytes = meter.graphs(), meter.peak_bytes()
        results.extend(Generation(row.text, row.tokens, row.reason, stats) for row in rows)

    def answer(self, decoding: Decoding) -> Row:
        """An answer without tokens yet."""
        return Row(self._tokenizer, decoding, self.config.eos_token_ids)

    def measure(self, session: Session, stats: Stats) -> None:
        """Write into `stats` what the cache of a session holds now."""
        cache = session.cache
        stats.seen = cache.next_pos[: len(session.active)].tolist()  # sync: once, at the end
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
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        for index, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise PromptError(
                    f"token id {token} at place {index} of the prompt is outside the vocabulary of "
                    f"{self.config.vocab_size}"
                )
        if not ids or (isinstance(prompt, str) and not prompt):
            raise PromptError("the prompt is empty; give at least one token")
        return ids

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
            policy: ReSTKV(budget=1024) when none is given.
            prefill, chunk: see Session.
        """
        policy = ReSTKV(budget=1024) if policy is None else policy
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

    @own_modes
    def score(self, session: Session, continuations: Sequence[Prompt]) -> list[float]:
        """Summed log-probability (nats) of each continuation on its own fork of a one-row session.

        Raises:
            NumericError: a token was judged by logits that are no numbers.
        """
        sums = []
        for target in self._targets(continuations):
            fork = session.fork()
            try:
                fork.resume(len(target))  # a row that has ended can be judged too
                total = 0.0
                for index, token in enumerate(target):
                    total += float(fork.logits_BV[0].log_softmax(-1)[token])  # sync: a score is a number
                    if math.isnan(total):
                        raise fork.numeric_error(0, target[:index])
                    if index + 1 < len(target):
                        fork.feed(torch.tensor([token], device=self.device))
            finally:
                fork.cache.free()
            sums.append(total)
        return sums

    def _targets(self, continuations: Sequence[Prompt]) -> list[list[int]]:
        continuations = _listed(continuations)
        if isinstance(continuations, str | bytes) or any(isinstance(one, Integral) for one in continuations):
            raise PromptError(f"continuations {continuations!r} is one text; give a list of them, if only of one")
        return [self.encode_continuation(text) for text in continuations]

    def encode_continuation(self, continuation: Prompt) -> list[int]:
        """Token ids of text that goes on after other text: like `encode`, without a BOS or a first space."""
        if isinstance(continuation, str):
            return self.encode(self.tokenizer.encode_more(continuation))
        return self.encode(continuation)


def _listed(prompt: Any) -> Any:
    """A tensor or an array as lists (on the host, where ids are checked); anything else as it is."""
    return prompt.tolist() if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview) else prompt


def _token_ids(prompt: Any) -> list[int]:
    """Whole numbers, in whatever they came, as a list."""
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(f"a prompt of {len(prompt)} bytes is neither text nor token ids; decode it first")
    try:
        ids = list(_listed(prompt))
    except TypeError:
        raise PromptError(f"prompt {prompt!r} is neither text nor token ids; give a string, or a list of ids") from None
    for index, token in enumerate(ids):
        if not isinstance(token, Integral):
            raise PromptError(
                f"token id {token!r} at place {index} of the prompt is no whole number; give ids, or text"
            )
    return [int(token) for token in ids]

"""What a generation gives back: options in, text, tokens and measured costs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from modeling.text.stream import Stream
from modeling.text.tokenizer import Tokenizer
from restkv.errors import PromptError
from restkv.policies.base import TOO_MANY
from restkv.sampling import Sampling
from restkv.stops import StopSearch


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn and where it ends: the options of LM.generate and its kin.

    Args:
        max_new_tokens: a whole number, at least 1.
        temperature, top_k, top_p, min_p, seed: see Sampling.
        stop: a string or strings that end the text, themselves left out; None is none. Special tokens, which the text leaves out,
            count as they are spelled.
        ignore_eos: go on after an end-of-sequence id.
    Raises:
        PromptError: an impossible value.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int):
            raise PromptError(f"max_new_tokens={self.max_new_tokens!r} is no whole number; give one of at least 1")
        if self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens={self.max_new_tokens} makes nothing; give at least 1")
        if self.max_new_tokens >= TOO_MANY:
            raise PromptError(f"max_new_tokens={self.max_new_tokens}: give a number below {TOO_MANY}")
        if not isinstance(self.stop, str | Sequence | None) or any(not isinstance(one, str) for one in self.stop or ()):
            raise PromptError(f"stop={self.stop!r} is no text; give a string, or a list of strings")
        if "" in self.stops:
            raise PromptError(
                f"stop={self.stop!r}: an empty string would end every answer before it begins; leave it out"
            )
        _ = self.sampling

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @cached_property  # a loop asks at every step
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)


@dataclass
class Stats:
    """What a generation cost; every figure is measured.

    Attributes:
        method, budget: the policy's name and budget as given (None: no budget).
        question: "aware" when what is asked was part of the prompt that was evicted, "agnostic" when the context had been
            evicted before it was asked.
        prompt_tokens, new_tokens: per row.
        ttft_s: seconds from the call to the first token of the last row to start (prefill of all rows, eviction, first sample).
        tpot_s: median seconds per decode step after the first token, all rows together; 0 when there was none.
        tokens_per_s: new tokens after the first, of all rows, per second of decoding.
        seen: entries a full cache would hold per KV head at the end, per row.
        kept: per layer, per row: live entries per KV head (mean over heads) at the end.
        rank_entries: live entries of every rank that shares the model: of all layers, rows and its KV heads together.
        max_kept: the largest number of live entries any KV head of any layer held when it was looked at (each eviction, end).
        live_bytes, allocated_bytes, full_bytes: cache bytes of live entries, of pages held, and of a full cache, at the end; all
            ranks together.
        peak_bytes: peak memory of the process (CPU) or the allocator (CUDA) during the call, weights included; the largest of all
            ranks.
        evictions: decode-time evictions.
        evicts: how those that are due after a token run: "compiled", "eager", or "" where there are none.
        scores: how the prompt's entries were scored: "compiled" (in pieces), "eager", or "" where nothing had to go.
        graphs: graphs torch.compile made during the call.
    """

    method: str
    budget: int | float | tuple[int, ...] | None
    prompt_tokens: list[int]
    question: str = "aware"
    new_tokens: list[int] = field(default_factory=list)
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    tokens_per_s: float = 0.0
    seen: list[int] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)
    rank_entries: list[int] = field(default_factory=list)
    max_kept: int = 0
    live_bytes: int = 0
    allocated_bytes: int = 0
    full_bytes: int = 0
    peak_bytes: int = 0
    evictions: int = 0
    evicts: str = ""
    scores: str = ""
    graphs: int = 0

    @property
    def imbalance(self) -> float:
        """Entries of the fullest rank over their mean: 1 where all hold the same; a step waits for the fullest."""
        total = sum(self.rank_entries)
        return max(self.rank_entries) * len(self.rank_entries) / total if total else 1.0

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
            if piece:
                yield piece

    @property
    def generation(self) -> Generation:
        if not self._results:
            raise RuntimeError("the stream has not ended yet: iterate over it first, then read .generation")
        return self._results[0]


class Row:
    """One row's tokens and text as they come: end-of-sequence ids, stop strings, length."""

    def __init__(self, tokenizer: Tokenizer | None, options: Decoding, eos: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reason = ""
        self._eos = frozenset(() if options.ignore_eos else eos)
        self._limit = options.max_new_tokens
        self._decoder = Stream(tokenizer) if tokenizer is not None else None
        self._search: StopSearch | None = None
        if tokenizer is not None and self._decoder is not None and options.stops:
            self._search = StopSearch(tokenizer, options.stops, self._decoder)

    def push(self, token: int) -> str:
        """Take one token; returns the text that is now certain."""
        self.tokens.append(token)
        ends = token in self._eos
        if ends:
            self.reason = "eos"
        elif len(self.tokens) == self._limit:
            self.reason = "length"
        if self._decoder is None:
            return ""
        piece = "" if ends else self._decoder.push(token)
        if self.reason:
            piece += self._decoder.flush()
        if self._search is not None:
            piece, found = self._search.push(token, piece, bool(self.reason), ends)
            if found:
                self.reason = "stop"
        self.text += piece
        return piece

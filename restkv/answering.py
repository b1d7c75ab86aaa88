"""The core that answers: prompts become token ids, a session's rows become text, and continuations are judged.

LM stands on it, and so does whatever keeps a session of its own: a chat, a compressed context, a benchmark.
Letters: B batch rows, N tokens of a burst, E ids that end an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch

from modeling.layers import Decoder
from modeling.modes import own_modes
from modeling.ranks import Ranks
from modeling.text.tokenizer import Tokenizer
from restkv.engine import Engine
from restkv.errors import PromptError
from restkv.meter import Meter
from restkv.phrases import Phrases
from restkv.results import Decoding, Generation, Row, Stats
from restkv.session import BROKEN, Session

Prompt = str | Sequence[int]


class Answering:
    """A model with its tokenizer and engine.

    Attributes: model, config, ranks, tokenizer, engine, device, dtype, backend, compiled.

    Args:
        named: see Engine.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, backend: str = "sdpa", named: bool = True) -> None:
        self.model, self._tokenizer = model, tokenizer
        self.config = model.config
        self.engine = Engine(model, backend, named, Phrases(tokenizer))

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
    def ranks(self) -> Ranks:
        """The processes that share the model; `config` has this one's heads and part of the MLP's width."""
        return self.model.ranks

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def backend(self) -> str:
        return self.engine.backend

    @property
    def compiled(self) -> bool:
        return self.backend == "flex"

    # -- prompts

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

    def encode_continuation(self, continuation: Prompt) -> list[int]:
        """Token ids of text that goes on after other text: like `encode`, without a BOS or a first space."""
        if isinstance(continuation, str):
            return self.encode(self.tokenizer.encode_more(continuation))
        return self.encode(continuation)

    # -- answers

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
        generators = decoding.sampling.generators(len(rows), self.ranks)
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
        stats.graphs, (stats.peak_bytes,) = meter.graphs(), self.ranks.most([meter.peak_bytes()])
        results.extend(Generation(row.text, row.tokens, row.reason, stats) for row in rows)

    def answer(self, decoding: Decoding) -> Row:
        """An answer without tokens yet."""
        return Row(self._tokenizer, decoding, self.config.eos_token_ids)

    def measure(self, session: Session, stats: Stats) -> None:
        """Write into `stats` what the cache of a session holds now, on all ranks together."""
        cache = session.cache
        stats.seen = cache.next_pos[: len(session.active)].tolist()  # sync: once, at the end
        kept, heads = session.kept(), self.config.num_kv_heads
        highest = max(session.evictor.max_live, *(int(layer.live_counts().max()) for layer in cache.layers))
        full_bytes = sum(stats.seen) * self.config.kv_bytes_per_token(self.dtype)
        flat = [mean for rows in kept for mean in rows]
        table = self.ranks.table([highest, cache.live_bytes, cache.allocated_bytes, full_bytes, *flat])
        highests, *totals = list(zip(*table, strict=True))[:4]
        stats.max_kept = int(max(highests))
        stats.live_bytes, stats.allocated_bytes, stats.full_bytes = (int(sum(bytes_n)) for bytes_n in totals)
        means = [sum(mean_n) / len(table) for mean_n in zip(*(row[4:] for row in table), strict=True)]
        rows = len(stats.seen)
        stats.kept = [means[start : start + rows] for start in range(0, len(means), rows)]
        stats.rank_entries = [round(sum(row[4:]) * heads) for row in table]
        stats.evictions = session.evictor.evictions
        stats.scores = min(session.evictor.scored, default="")
        if session.schedule.interval:
            stats.evicts = "compiled" if session.engine.masks(session.policy) else "eager"

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
        continuations = listed(continuations)
        if isinstance(continuations, str | bytes) or any(isinstance(one, Integral) for one in continuations):
            raise PromptError(f"continuations {continuations!r} is one text; give a list of them, if only of one")
        return [self.encode_continuation(text) for text in continuations]


def listed(prompt: Any) -> Any:
    """A tensor or an array as lists (on the host, where ids are checked); anything else as it is."""
    # Sync: once per prompt, if it is on a device.
    return prompt.tolist() if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview) else prompt


def _token_ids(prompt: Any) -> list[int]:
    """Whole numbers, in whatever they came, as a list."""
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(f"a prompt of {len(prompt)} bytes is neither text nor token ids; decode it first")
    try:
        ids = list(listed(prompt))
    except TypeError:
        raise PromptError(f"prompt {prompt!r} is neither text nor token ids; give a string, or a list of ids") from None
    for index, token in enumerate(ids):
        if not isinstance(token, Integral):
            raise PromptError(
                f"token id {token!r} at place {index} of the prompt is no whole number; give ids, or text"
            )
    return [int(token) for token in ids]

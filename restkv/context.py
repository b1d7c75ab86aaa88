"""A context compressed once and asked many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modeling.modes import own_modes
from modeling.room import enough_memory
from restkv.answering import Answering, Prompt
from restkv.errors import PromptError
from restkv.meter import Meter
from restkv.results import Decoding, Generation, Stats, TextStream
from restkv.saving.checks import require_context
from restkv.saving.store import load_session, refused, save_session
from restkv.session import Session


class CompressedContext:
    """What a policy kept of a text, frozen: asking never changes it. Made by LM.compress, or read back by `load`.

    The text was evicted before any question was known, so that answers are query-agnostic (`stats.question == "agnostic"`);
    LM.generate on text and question together is query-aware.

    Attributes:
        lm: the model it belongs to.
        policy: what chose the entries, and goes on evicting while an answer grows.
        tokens: how many tokens of text there were.
    """

    def __init__(self, lm: Answering, session: Session, tokens: int) -> None:
        self.lm, self.policy, self.tokens = lm, session.policy, tokens
        self._session = session

    def ask(self, question: Prompt, **options: Any) -> Generation:
        """Append a question to a copy of the context and answer it.

        Args:
            question: text (encoded without BOS) or token ids, as it should follow the context.
            options: the fields of Decoding (max_new_tokens, temperature, stop, ...).
        """
        stream = self.stream(question, **options)
        for _ in stream:
            pass
        return stream.generation

    def stream(self, question: Prompt, **options: Any) -> TextStream:
        """Like `ask`, yielding pieces of text as they are made."""
        results: list[Generation] = []
        return TextStream(self._answer(question, results, Decoding(**options)), results)

    @own_modes
    def _answer(self, question: Prompt, results: list[Generation], decoding: Decoding) -> Iterator[tuple[int, str]]:
        ids = self.lm.encode_continuation(question)
        stats = Stats(self.policy.name, self.policy.budget, [self.tokens + len(ids)], question="agnostic")
        meter = Meter(self.lm.device)
        fork = self._session.fork(decoding.max_new_tokens)
        try:
            fork.extend([ids])
            yield from self.lm.decode(fork, decoding, stats, meter, results)
        finally:
            fork.cache.free()

    def logprobs(self, continuations: Sequence[Prompt]) -> list[float]:
        """Summed log-probability (nats) of each continuation, each teacher-forced on a copy of its own."""
        return self.lm.score(self._session, continuations)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages the context holds."""
        return self._session.cache.allocated_bytes

    @property
    @own_modes
    def kept(self) -> list[float]:
        """Live entries per KV head (mean over heads) of every layer."""
        return [row[0] for row in self._session.kept()]

    @own_modes
    def save(self, path: str | Path) -> None:
        """Write entries, positions, policy and the model's fingerprint to one safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        save_session(self._session, path, {"kind": "context", "tokens": self.tokens})

    @classmethod
    @own_modes
    def load(cls, path: str | Path, lm: Answering) -> CompressedContext:
        """Read a saved context.

        Raises:
            PromptError: no such file, a damaged one, not a context, or one of another model (both are named).
        """
        with enough_memory(f"read {path}", "free some, or save it under a smaller budget"):
            session, about = load_session(lm.engine, path)
        if about.get("kind") == "chat":
            raise PromptError(
                f"{path}: holds a chat, not a context; go on with it in Chat.load, or `restkv chat --load`"
            )
        with refused(path):
            return cls(lm, session, require_context(about, session.cache.next_pos.tolist()))  # sync: once per file

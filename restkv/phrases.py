"""What probes ask of a model, as token ids that follow a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from modeling.text.tokenizer import Tokenizer

_MARK = "restkv-content"


class Phrases:
    """Requests to a model as token ids that follow a text. Where there is a chat template, a request ends the user's turn and
    opens the assistant's; without a tokenizer nothing is said.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    def request(self, text: str, quoted: Sequence[int] = ()) -> tuple[int, ...]:
        """Ask for something; `quoted`: tokens that the request ends with."""
        if self._tokenizer is None:
            return tuple(quoted)
        return (*self._tokenizer.encode_more(f"\n\n{text}"), *quoted, *self._closing)

    def begin(self, text: str) -> tuple[int, ...]:
        """Put the first words of an answer into the model's mouth."""
        return () if self._tokenizer is None else tuple(self._tokenizer.encode_more(text))

    def reply(self, text: str) -> tuple[int, ...]:
        """Ask for something else once the model has answered."""
        if self._tokenizer is None:
            return ()
        if not self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode_more(f"\n{text}\n"))
        turns = [("user", "?"), ("assistant", _MARK), ("user", text)]
        return self._after_mark([{"role": role, "content": content} for role, content in turns])

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        assert self._tokenizer is not None
        if not self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode_more("\n"))
        return self._after_mark([{"role": "user", "content": _MARK}])

    def _after_mark(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        assert self._tokenizer is not None
        _, _, after = self._tokenizer.render(messages).rpartition(_MARK)
        return tuple(self._tokenizer.encode(after, bos=False))

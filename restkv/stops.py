"""Stop strings: found in an answer's text with its special tokens as well as in the text that is shown, which has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modeling.stream import Stream
from modeling.tokenizer import Tokenizer


@dataclass
class _Part:
    """What one token made certain.

    Attributes:
        full, shown: text with special tokens, and without. Where they differ they end alike.
        before: of a special token that is not shown: the text before it in `full`; else None.
    """

    full: str
    shown: str
    before: str | None

    def shown_before(self, place: int) -> str:
        """The shown text before a place in `full`."""
        if self.before is not None:
            return self.before[:place]
        return self.shown[: max(0, len(self.shown) - (len(self.full) - place))]


class StopSearch:
    """Holds back text that a stop string may begin in, so that no text need ever be taken back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = Stream(tokenizer, skip_special=False)
        self._parts: list[_Part] = []  # what has been held back

    def push(self, token: int, shown: str, last: bool, eos: bool) -> tuple[str, bool]:
        """Take one token.

        Args:
            shown: text that it makes certain, without special tokens.
            last: nothing comes after it. `eos`: it ends the answer by itself, so no stop string begins in it.
        Returns:
            the text that is certain to come before any stop string, and whether one was found, right behind that text.
        """
        full = self._stream.push(token) + (self._stream.flush() if last else "")
        before = None
        if eos or self._tokenizer.spelling(token) is None:
            before = full.removesuffix(self._tokenizer.spelling(token, skip_special=False) or "")
        self._parts.append(_Part(full, shown, before))
        all_full, all_shown = ("".join(getattr(part, name) for part in self._parts) for name in ("full", "shown"))
        latest = len(all_full) - (len(full) - len(before or "")) - 1 if eos else len(all_full)
        found = [all_shown[:at] for at in self._places(all_shown)]
        found += [self._shown_before(at) for at in self._places(all_full) if at <= latest]
        if found:
            return min(found, key=len), True
        if last:
            return all_shown, False
        free = len(all_full) - self._beginning(all_full)
        sure = min(len(self._shown_before(free)), len(all_shown) - self._beginning(all_shown), len(all_shown))
        self._drop(free, sure)
        return all_shown[:sure], False

    def _places(self, text: str) -> list[int]:
        return [at for at in (text.find(stop) for stop in self._stops) if at >= 0]

    def _beginning(self, text: str) -> int:
        """How many characters at the end of a text may be the start of a stop string."""
        return max(_overlap(text, stop) for stop in self._stops)

    def _shown_before(self, place: int) -> str:
        """The shown text before a place in the full text of all parts."""
        pieces: list[str] = []
        for part in self._parts:
            if place < len(part.full):
                return "".join([*pieces, part.shown_before(place)])
            place -= len(part.full)
            pieces.append(part.shown)
        return "".join(pieces)

    def _drop(self, full: int, shown: int) -> None:
        """Forget so many characters of each text."""
        for part in self._parts:
            cut = min(full, len(part.full))
            full -= cut
            part.full = part.full[cut:]
            if part.before is not None:
                part.before = part.before[cut:]
            cut = min(shown, len(part.shown))
            shown -= cut
            part.shown = part.shown[cut:]
        self._parts = [part for part in self._parts if part.full or part.shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

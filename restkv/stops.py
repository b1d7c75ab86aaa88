"""Stop strings: found in an answer's text with its special tokens as well as in the text that is shown, which has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modeling.errors import TokenizerError
from modeling.text.stream import Stream
from modeling.text.tokenizer import Tokenizer


@dataclass
class _Part:
    """What one token made certain.

    Attributes:
        full, shown: text with special tokens, and without. Where they differ they end alike.
        lead, owed: of a special token that is not shown: how much text comes before it in `full`, and the text before it that the
            shown text still holds back (it may be a part of a character); else 0 and None.
    """

    full: str
    shown: str
    lead: int = 0
    owed: str | None = None

    def shown_before(self, place: int) -> str:
        """The shown text before a place in `full`."""
        text, after = (self.shown, len(self.full)) if self.owed is None else (self.owed, self.lead)
        return text[: max(0, len(text) - max(0, after - place))]


class StopSearch:
    """Holds back text that a stop string may begin in, so that no text need ever be taken back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], shown: Stream) -> None:
        """`shown`: the stream of the text without special tokens."""
        self._tokenizer, self._stops, self._shown = tokenizer, stops, shown
        self._full = Stream(tokenizer, skip_special=False)
        self._parts: list[_Part] = []  # what has been held back
        # For decoders that must see all tokens: what there has been of tokens and certain text, and how much of it was given out.
        self._ids: list[int] = []
        self._texts, self._said = {"full": "", "shown": ""}, 0

    def push(self, token: int, shown: str, last: bool, eos: bool) -> tuple[str, bool]:
        """Take one token.

        Args:
            shown: text without special tokens that it made certain.
            last: nothing comes after it.
            eos: it ends the answer by itself, so no stop string begins in it.
        Returns:
            the text that is certain to come before any stop string, and whether one was found, right behind that text.
        """
        part = _Part(self._full.push(token) + (self._full.flush() if last else ""), shown)
        if not self._tokenizer.outlook.piecewise:
            return self._push_whole(token, part, last, eos)
        if eos or self._tokenizer.spelling(token) is None:
            part.lead = len(part.full.removesuffix(self._tokenizer.spelling(token, skip_special=False) or ""))
            part.owed = shown or self._shown.held()
        self._parts.append(part)
        all_full, all_shown = ("".join(getattr(part, name) for part in self._parts) for name in ("full", "shown"))
        latest = len(all_full) - (len(part.full) - part.lead) - 1 if eos else len(all_full)
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

    def _push_whole(self, token: int, part: _Part, last: bool, eos: bool) -> tuple[str, bool]:
        """As push, for a decoder whose texts come late: places in them are found by decoding all tokens anew."""
        self._ids.append(token)
        full, shown = self._texts["full"] + part.full, self._texts["shown"] + part.shown
        self._texts = {"full": full, "shown": shown}
        latest = self._length(len(self._ids) - 1) - 1 if eos else len(full)
        found = self._places(shown) + [self._place_shown(at, eos) for at in self._places(full) if at <= latest]
        said = self._said
        if found:
            whole = self._tokenizer.decode(self._ids[:-1] if eos else self._ids)
            return whole[said : max(said, min(found))], True
        free = self._place_shown(len(full) - self._beginning(full), eos)
        sure = len(shown) if last else min(free, len(shown) - self._beginning(shown))
        self._said = max(said, min(sure, len(shown)))
        return shown[said : self._said], False

    def _place_shown(self, place: int, eos: bool) -> int:
        """A place in the text with special tokens as one in the text without."""
        hidden = 0
        for number, token in enumerate(self._ids):
            if (eos and number == len(self._ids) - 1) or self._tokenizer.spelling(token) is None:
                begin, end = self._length(number), self._length(number + 1)
                hidden += max(0, min(place, end) - begin)
        return place - hidden

    def _length(self, count: int) -> int:
        """Characters of so many tokens, special ones too."""
        try:
            return len(self._tokenizer.decode(self._ids[:count], skip_special=False))
        except TokenizerError:  # a Strip of more than there is
            return 0

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
            part.full, part.lead = part.full[cut:], max(0, part.lead - cut)
            if part.owed is not None:
                part.owed = part.owed[shown:]  # it is the beginning of what later parts show
            cut = min(shown, len(part.shown))
            shown -= cut
            part.shown = part.shown[cut:]
        self._parts = [part for part in self._parts if part.full or part.shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

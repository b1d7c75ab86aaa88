"""Text of token ids that come one by one."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable
from typing import Protocol

from modeling.errors import TokenizerError
from modeling.text.outlook import UNSURE, Outlook

LONGEST = 4  # bytes of a character, and so tokens that can be parts of one
UTF8 = codecs.getincrementaldecoder("utf-8")


class Decoding(Protocol):
    """What a stream asks a tokenizer (modeling/text/tokenizer.py)."""

    outlook: Outlook

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...
    def spelling(self, token: int, skip_special: bool = True) -> str | None: ...
    def byte(self, token: int) -> int | None: ...


class Stream:
    """Token ids in, text out, as early as it is certain: the pieces joined are exactly decode() of all ids.

    Text is held back while it may still change, which is in two cases. It ends in the middle of a UTF-8 character: then the last
    U+FFFD waits, for as many as three more tokens. Or it ends in a run of SentencePiece byte tokens, which decode together or, if
    one of them does not fit, each to a U+FFFD: then the run waits until it ends or fits no more.

    A decoder that looks further (modeling/text/outlook.py) is asked for the whole text at every token, and what may still change
    waits; where nothing can be said of that, all text waits for flush().
    """

    def __init__(self, tokenizer: Decoding, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._reset()

    def _reset(self) -> None:
        # Ids whose text has not all been given out, behind some whose text has been. A decoder may treat the first of all
        # tokens in its own way (SentencePiece drops its space), so new ids are always decoded behind some old ones.
        self._ids: list[int] = []
        self._old = 0  # how many of them were there when everything had last been given out
        self._given: int | None = 0  # characters of their text given out; None: of the old ones all
        self._utf8 = UTF8()  # of the run of byte tokens at the end
        self._broken = False  # that run is no text

    def push(self, token: int) -> str:
        """The text that `token` makes certain; "" if there is none yet."""
        if self._tokenizer.spelling(token, self._skip_special) is None:
            return ""
        self._ids.append(token)
        if not self._tokenizer.outlook.piecewise:
            return self._settled(token)
        byte = self._tokenizer.byte(token)
        if byte is None:
            self._utf8.reset()
            self._broken = False
            return self._certain()
        if self._broken:  # not decoded, so that a long run takes linear time
            self._start_after(1)
            return UNSURE
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken = True
            return self._rest()
        return ""

    def flush(self) -> str:
        """All text held back; the stream can go on after it as if new."""
        piece = self._behind()
        self._reset()
        return piece

    def held(self) -> str:
        """The text held back, as it would be if nothing came after it."""
        try:
            return self._behind()
        except TokenizerError:
            if self._tokenizer.outlook.piecewise:
                raise
            return ""

    def _behind(self) -> str:
        return self._text(self._ids)[self._already() :]

    def _settled(self, token: int) -> str:
        """The new text that no token can change, of a decoder that must see all tokens."""
        unsettled = self._tokenizer.outlook.unsettled
        if math.isinf(unsettled) or self._tokenizer.byte(token) is not None:
            return ""
        try:
            text = self._text(self._ids)
        except TokenizerError:  # the library fails on a text shorter than what a Strip may take off; more may come
            return ""
        given = self._already()
        self._given = max(given, len(text) - int(unsettled))
        return text[given : self._given]

    def _certain(self) -> str:
        """The new text but for a last U+FFFD."""
        given, text = self._already(), self._text(self._ids)
        sure = len(text) - text.endswith(UNSURE)
        if sure == len(text):
            self._start_after(len(self._ids) - self._old)
        elif len(self._ids) > 2 * LONGEST:
            self._ids, self._old = self._ids[-LONGEST:], 0  # those before it are in no character that can still come
            self._given = len(self._text(self._ids)) - 1
        else:
            self._given = max(given, sure)
        return text[given:sure]

    def _rest(self) -> str:
        """All the new text."""
        piece = self._behind()
        self._start_after(1)
        return piece

    def _already(self) -> int:
        return len(self._text(self._ids[: self._old])) if self._given is None else self._given

    def _start_after(self, count: int) -> None:
        """Everything has been given out; the last `count` tokens stay."""
        self._ids = self._ids[-count:] if count else []
        self._old, self._given = len(self._ids), None

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

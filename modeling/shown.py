"""Text that is not ours, as it may be shown: whatever could steer a terminal stands as its escape."""

from __future__ import annotations

import re

LONGEST = 4000  # characters of a message in one line
HARMFUL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls of ASCII and of Latin-1, but line feeds and tabs
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    r"\u2028\u2029"  # line ends of Unicode
    r"\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible, and no part of any word
    r"\ud800-\udfff]"  # halves of characters, and bytes of a path that are no UTF-8
)


def shown(text: str) -> str:
    """The text with every harmful character as Python would write its escape (\\x1b, \\u202e); the rest stays as it is.

    >>> shown("a story" + chr(27) + "[2J")
    'a story\\\\x1b[2J'
    """
    return HARMFUL.sub(_escape, text)


def one_line(text: str) -> str:
    """The text in one line, shown; the middle of a very long one is left out."""
    line = shown(" ".join(text.split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} [{len(line) - LONGEST} characters] {line[-LONGEST // 2 :]}"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")

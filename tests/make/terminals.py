"""Streams that say that they are terminals, and texts that would steer one."""

from __future__ import annotations

import io

from modeling.shown import HARMFUL

CLIPBOARD, TITLE = "\x1b]52;c;aGk=\x07", "\x9d0;x\x9c"


HOSTILE = f"a{CLIPBOARD}b\rc\x08d\x7f{TITLE}\u202eevil\u2066[bold]x[/bold]\x00"


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def clean(text: str) -> bool:
    return not HARMFUL.search(text)

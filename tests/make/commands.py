"""Command lines, and what one gave."""

from __future__ import annotations

import sys
from typing import NamedTuple

STORY = (
    "Once upon a time, there was a little girl named Lily. Lily has a red ball. Tom has a blue kite. "
    "The sun was warm and the sky was clear. They walked to the park together."
)


COMMAND = (sys.executable, "-m", "restkv")


LONG = ("generate", "-p", STORY, "--budget", "64", "--interval", "16", "-n", "900")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self) -> list[str]:
        return self.err.splitlines()

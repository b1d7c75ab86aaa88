"""How many examples a test draws."""

from __future__ import annotations

import os

IN_CI = bool(os.environ.get("CI"))


def many(count: int, part: int = 5) -> int:
    """So many by hand, where hypothesis draws new ones; a part of them where CI is set, and it draws the same every time."""
    return count // part if IN_CI else count

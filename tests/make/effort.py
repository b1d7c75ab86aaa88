"""How many examples a slow test draws."""

from __future__ import annotations

import os

IN_CI = bool(os.environ.get("CI"))


def many(count: int) -> int:
    """So many by hand, where hypothesis draws new ones; a fifth where CI is set, and it draws the same ones every time."""
    return count // 5 if IN_CI else count

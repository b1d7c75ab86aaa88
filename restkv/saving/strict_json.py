"""JSON as its standard has it: no NaN, no infinity, no half characters, and no nesting that ends the interpreter's stack."""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: str) -> Any:
    """What the text says.

    Raises:
        ValueError: it is no JSON (one line says why), nests too deeply, or has numbers or characters that nothing can compute
            with or write down.
    """
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    return value


def shown(value: Any) -> str:
    """A value in a message: short, and in one line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number

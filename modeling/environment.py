"""Packages that the environment keeps from being imported: what to say of it, in one line. Needs no torch."""

from __future__ import annotations

import os
import re

from modeling.free import free_text
from modeling.room import lacking

# The variables that a package, and what it brings along, reads.
PREFIXES = {
    "torch": ("TORCH", "PYTORCH", "TRITON", "ATEN", "CUDA", "CXX"),
    "matplotlib": ("MPL", "MATPLOTLIB"),
    "huggingface_hub": ("HF_", "HUGGING", "SSL_", "HTTP", "http", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"),
}


def cannot_import(package: str, error: BaseException) -> str:
    """Why a package that is installed cannot be imported, and what may help."""
    return f"{package} cannot be imported ({first_line(error)}); {mend(package, error)}"


def mend(package: str, error: BaseException) -> str:
    """What may help: to correct the variables that the error is about, or to free memory."""
    if names := blamed(package, error):
        return f"correct or unset {' and '.join(f'{name}={os.environ[name]}' for name in names)}"
    if lacking(_root(error)) is not None:
        return more_memory()
    prefixes = [prefix for prefix in PREFIXES.get(package, ()) if prefix.isupper()]
    variables = "".join(f" {prefix.rstrip('_')}_*" for prefix in prefixes[:2])
    return f"check how it is installed, the environment variables{variables}, and free memory"


def more_memory() -> str:
    """What helps where memory is short."""
    try:
        free = free_text()
    except MemoryError:
        free = ""
    return f"free memory, or raise its limits{f' ({free})' if free else ''}"


def blamed(package: str, error: BaseException) -> list[str]:
    """The environment variables of a package that an error names, or whose values it shows."""
    text = str(_root(error))
    known = {
        name: value for name, value in os.environ.items() if name.startswith(PREFIXES.get(package, (package.upper(),)))
    }
    named = [name for name in known if re.search(rf"\b{re.escape(name)}\b", text)]
    return named or [
        name for name, value in known.items() if len(value) > 1 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)
    ]


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    root = _root(error)
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return ": ".join([type(root).__name__, *lines[:1]])[:200]


def _root(error: BaseException) -> BaseException:
    """What an error was made of: packages wrap the reason in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

"""restkv: long prompts in small KV caches.

>>> import restkv
>>> restkv.get_policy("restkv", budget=256).window
32
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from restkv.errors import RestKVError

if TYPE_CHECKING:
    from restkv.chat import Chat
    from restkv.context import CompressedContext
    from restkv.lm import LM, load
    from restkv.policies import (
        CAOTE,
        H2O,
        POLICIES,
        RKV,
        TOVA,
        AdaKV,
        Compactor,
        CurDKV,
        ExpectedAttention,
        FullCache,
        KeyDiff,
        KeyNorm,
        KVzip,
        KVzipPlus,
        LaCache,
        Policy,
        PyramidKV,
        Random,
        ReSTKV,
        SnapKV,
        StreamingLLM,
        get_policy,
    )

__all__ = [
    "CAOTE",
    "H2O",
    "LM",
    "POLICIES",
    "RKV",
    "TOVA",
    "AdaKV",
    "Chat",
    "Compactor",
    "CompressedContext",
    "CurDKV",
    "ExpectedAttention",
    "FullCache",
    "KVzip",
    "KVzipPlus",
    "KeyDiff",
    "KeyNorm",
    "LaCache",
    "Policy",
    "PyramidKV",
    "Random",
    "ReSTKV",
    "RestKVError",
    "SnapKV",
    "StreamingLLM",
    "get_policy",
    "load",
]

__version__ = "0.1.0"

# Where the names of __all__ live that are not policies.
_HOME = {
    "LM": "restkv.lm",
    "load": "restkv.lm",
    "Chat": "restkv.chat",
    "CompressedContext": "restkv.context",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import restkv` alone does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'restkv' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "restkv.policies")), name)

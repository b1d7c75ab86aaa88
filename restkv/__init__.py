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
    from restkv.lm import LM, load
    from restkv.policies import POLICIES, FullCache, Policy, ReSTKV, SnapKV, get_policy

__all__ = ["LM", "POLICIES", "FullCache", "Policy", "ReSTKV", "RestKVError", "SnapKV", "get_policy", "load"]

__version__ = "0.1.0"

_HOME = {"LM": "restkv.lm", "load": "restkv.lm"}  # the rest of __all__ is in restkv.policies


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import restkv` alone does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'restkv' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "restkv.policies")), name)

"""restkv: long prompts in small KV caches.

>>> import restkv
>>> restkv.get_policy("restkv", budget=256).name
'restkv'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from restkv.errors import RestKVError
from restkv.policies import POLICIES, FullCache, Policy, ReSTKV, SnapKV, get_policy

if TYPE_CHECKING:
    from restkv.lm import LM, load

__all__ = ["LM", "POLICIES", "FullCache", "Policy", "ReSTKV", "RestKVError", "SnapKV", "get_policy", "load"]


def __getattr__(name: str) -> Any:
    """Import the parts that load models only when they are asked for, so that `import restkv` stays quick."""
    if name in ("LM", "load"):
        from restkv import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'restkv' has no attribute {name!r}")

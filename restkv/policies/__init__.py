"""Every policy by name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from restkv.errors import PolicyError
from restkv.policies.base import Policy
from restkv.policies.full import FullCache
from restkv.policies.rest import ReSTKV
from restkv.policies.snapkv import SnapKV

__all__ = ["POLICIES", "FullCache", "Policy", "ReSTKV", "SnapKV", "get_policy"]

POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (ReSTKV, SnapKV, FullCache)}


def get_policy(name: str, preset: str | None = None, **options: Any) -> Policy:
    """Build a policy from its name.

    Args:
        name: a key of POLICIES.
        preset: a key of that policy's PRESETS; `options` override its values.
        options: fields of the policy.

    Raises:
        PolicyError: unknown name, preset or option (the message lists the known ones), or a value out of range.

    >>> get_policy("restkv", preset="paper-ruler", budget=1024).kernel_size
    21
    """
    if name not in POLICIES:
        raise PolicyError(f"method {name!r} is unknown; choose from {', '.join(POLICIES)}")
    cls = POLICIES[name]
    if preset is not None:
        if preset not in cls.PRESETS:
            known = f"choose from {', '.join(cls.PRESETS)}" if cls.PRESETS else "it has none"
            raise PolicyError(f"{name}: preset {preset!r} is unknown; {known}")
        options = {**cls.PRESETS[preset], **options}
    known_options = {field.name: field for field in fields(cls)}
    for option in options:
        if option not in known_options:
            raise PolicyError(f"{name}: option {option!r} is unknown; it takes {', '.join(known_options)}")
    if "budget" not in options and known_options["budget"].default is MISSING:
        raise PolicyError(f"{name}: budget is missing; give the entries to keep per head, or a fraction in (0, 1]")
    return cls(**options)

"""Policies of other packages, found through the entry point group `restkv.policies` (docs/policies.md)."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from restkv.errors import PolicyError
from restkv.policies.base import Policy

GROUP = "restkv.policies"


def plugin_names() -> list[str]:
    """Names that installed packages register. Nothing is imported."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_plugin(name: str) -> type[Policy] | None:
    """Import the policy registered under a name; None where no package registers it.

    Raises:
        PolicyError: two packages register it, it cannot be imported, or it is no Policy of that name.
    """
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        return None
    if len(points) > 1:
        both = " and ".join(sorted(map(_origin, points)))
        raise PolicyError(f"method {name!r}: registered by {both}; uninstall all but one")
    (point,) = points
    try:
        cls: Any = point.load()
    except Exception as error:  # whatever a foreign module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PolicyError(
            f"method {name!r}: {_origin(point)} cannot be imported ({reason}); repair or uninstall it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise PolicyError(
            f"method {name!r}: {_origin(point)} is not a subclass of restkv.Policy; repair or uninstall it"
        )
    if getattr(cls, "name", None) != name:
        raise PolicyError(
            f"method {name!r}: {_origin(point)} calls itself {getattr(cls, 'name', None)!r}; make the names equal"
        )
    return cls


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of the package {point.dist.name if point.dist else 'unknown'}"

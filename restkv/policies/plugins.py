"""Policies of other packages, found through the entry point group `restkv.policies` (docs/policies.md)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from restkv.errors import PolicyError
from restkv.plugins import PluginError, entry_points, load, origin, origins
from restkv.policies.base import Policy

GROUP = "restkv.policies"


def plugin_names() -> list[str]:
    """Names that installed packages register. Nothing is imported."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_plugin(name: str) -> type[Policy] | None:
    """Import the policy registered under a name; None where no package registers it.

    Raises:
        PolicyError: two packages register it, it cannot be imported, or it is no Policy of that name that can be made.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        return None
    if len(points) > 1:
        raise PolicyError(f"method {name!r}: registered by {origins(points)}; uninstall all but one")
    (point,) = points
    try:
        cls: Any = load(point)
    except PluginError as error:
        raise PolicyError(
            f"method {name!r}: {origin(point)} cannot be imported ({error}); repair or uninstall it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise PolicyError(
            f"method {name!r}: {origin(point)} is not a subclass of restkv.Policy; repair or uninstall it"
        )
    if getattr(cls, "name", None) != name:
        raise PolicyError(
            f"method {name!r}: {origin(point)} calls itself {getattr(cls, 'name', None)!r}; make the names equal"
        )
    wrong = _incomplete(cls)
    if wrong:
        raise PolicyError(f"method {name!r}: {origin(point)} {wrong}; repair or uninstall it")
    return cls


def _incomplete(cls: type[Policy]) -> str | None:
    """What a policy's class lacks before anything can be made of it."""
    if inspect.isabstract(cls):
        return f"has no {' and no '.join(sorted(cls.__abstractmethods__))}"
    presets: Any = cls.PRESETS
    if not isinstance(presets, Mapping) or not all(
        isinstance(name, str) and isinstance(options, Mapping) for name, options in presets.items()
    ):
        return "has PRESETS that do not map names to options"
    for choices in ("granularities", "reductions"):
        values: Any = getattr(cls, choices)
        if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
            return f"has {choices} {values!r}, not a tuple of names"
    return None

"""What other packages add: entry points that one broken package cannot hide, and loading that nothing in it can end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

from restkv.errors import RestKVError, RestKVWarning


class PluginError(RestKVError):
    """What another package registers cannot be used."""


def entry_points(group: str) -> list[EntryPoint]:
    """What installed packages register in a group. A package whose list of entry points cannot be read is left out, with a
    warning. Nothing is imported."""
    try:
        return list(metadata.entry_points(group=group))
    except Exception:  # one file that cannot be read: ask package by package
        pass
    found: dict[str, list[EntryPoint]] = {}
    for package in metadata.distributions():
        name = "a package"
        try:
            name = str(package.metadata["Name"])
            if name not in found:  # the first one is what an import finds
                found[name] = [point for point in package.entry_points if point.group == group]
        except Exception as error:
            warnings.warn(f"{name}: its entry points cannot be read ({_said(error)})", RestKVWarning, stacklevel=2)
    return [point for points in found.values() for point in points]


def load(point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        PluginError: it cannot be imported; a module that ends the interpreter while it is imported does not end this one.
    """
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(_said(error)) from error


def origin(point: EntryPoint) -> str:
    """Where an entry point leads, and whose it is."""
    return f"{point.value} of the package {point.dist.name if point.dist else 'unknown'}"


def origins(points: Sequence[EntryPoint]) -> str:
    return " and ".join(sorted(map(origin, points)))


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

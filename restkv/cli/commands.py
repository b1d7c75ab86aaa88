"""Commands that packages register in the entry point group `restkv.commands`: typer apps or functions, as bench does.

What cannot be used costs a note, and hides no other command.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from itertools import groupby
from typing import Any

import typer

from restkv.errors import RestKVWarning
from restkv.plugins import load, origins

OWN = "restkv"  # this package, whose names no other can take


def add_commands(app: typer.Typer, points: Iterable[EntryPoint]) -> None:
    """Add what can be used of the entry points to an app."""
    taken = set(getattr(typer.main.get_command(app), "commands", ()))
    for name, found in groupby(sorted(points, key=lambda point: point.name), key=lambda point: point.name):
        same = list(found)
        own = [point for point in same if point.dist is not None and point.dist.name == OWN]
        others = [point for point in same if point not in own]
        if others and (own or name in taken):
            _note(name, f"{origins(others)} would take the place of a command of {OWN}'s")
        if name in taken:
            continue
        if not own and len(others) > 1:
            _note(name, f"it is registered by {origins(others)}; uninstall all but one")
            continue
        (point, *_) = own or others
        try:
            loaded = load(point)
            if not own:
                _try(name, loaded)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _note(name, f"{error or type(error).__name__}", point.value)
            continue
        _add(app, name, loaded)


def _try(name: str, loaded: Any) -> None:
    """Fail here and now as the app would with this command in it."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError("its name is none that can be typed; letters, digits, points and dashes are")
    trial = typer.Typer()
    _add(trial, name, loaded)
    str(typer.main.get_command(trial).get_short_help_str())


def _add(app: typer.Typer, name: str, loaded: Any) -> None:
    if isinstance(loaded, typer.Typer):
        app.add_typer(loaded, name=name)
    else:
        app.command(name)(loaded)


def _note(name: str, why: str, value: str = "") -> None:
    where = f" ({value})" if value else ""
    warnings.warn(f"command {name!r}{where} cannot be used: {why}", RestKVWarning, stacklevel=3)

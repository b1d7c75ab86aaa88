"""rich's door to stdout and stderr, for text that is not ours."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from modeling.shown import shown
from restkv.cli.terminal import status, writing


class PlainConsole(Console):
    """A console that obeys nothing in what it prints: no markup is read, and control characters are shown as escapes.

    Strings are escaped before they are measured, so that tables keep their layout. Text objects are escaped when they are
    rendered: make those of foreign text with `shown`.

    Raises (from print):
        BrokenPipeError: whoever read it has gone. OutputError: it cannot be written, as on a full disk.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        status.clear()
        with writing():
            super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def table_console(piped: int = 120) -> PlainConsole:
    """stdout, at the terminal's width, or `piped` letters wide where it is none."""
    return PlainConsole(width=None if sys.stdout.isatty() else piped)

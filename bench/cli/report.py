"""`restkv bench report`: pages and tables of a folder of results."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from restkv.cli.terminal import json_text, put, put_line
from restkv.errors import PromptError, RestKVWarning


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of a run, complete or not.")],
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown; write nothing.")
    ] = False,
    plain_json: Annotated[
        bool, typer.Option("--json", help="Print manifest and tables as JSON; write nothing.")
    ] = False,
) -> None:
    """Build DIR/report.html, and the pictures of a needle run, from the results alone."""
    if as_markdown and plain_json:
        raise PromptError("--markdown and --json: give one of them")
    if plain_json:
        from bench.report.page import as_json

        put_line(json_text(as_json(folder), indent=1))
        return
    if as_markdown:
        from bench.report.page import markdown

        put(markdown(folder))
        return
    from bench.report.kinds import draw_pictures
    from bench.report.page import write_report
    from bench.runs.folder import read_manifest

    page = write_report(folder)
    for picture in draw_pictures(folder):
        put_line(picture)
    if "check" not in read_manifest(folder):
        warnings.warn(
            f"{folder}: made before results had check values; whether they are as they were written cannot be told",
            RestKVWarning,
            stacklevel=2,
        )
    put_line(page)

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
    as_latex: Annotated[bool, typer.Option("--latex", help="Print the tables as LaTeX; write nothing.")] = False,
    plain_json: Annotated[
        bool, typer.Option("--json", help="Print manifest and tables as JSON; write nothing.")
    ] = False,
) -> None:
    """Build DIR/report.html, and a needle run's heat maps, from the results alone."""
    if as_markdown + as_latex + plain_json > 1:
        raise PromptError("--markdown, --latex and --json: give one of them")
    if plain_json:
        from bench.report.page import as_json

        put_line(json_text(as_json(folder), indent=1))
        return
    if as_markdown or as_latex:
        from bench.report.page import latex, markdown

        put(markdown(folder) if as_markdown else latex(folder))
        return
    from bench.quality.needle import draw_needle
    from bench.report.kinds import fitting, read_run
    from bench.report.page import write_report

    page = write_report(folder)
    manifest, rows = read_run(folder)
    if manifest["kind"] == "needle":
        with fitting("heat maps"):
            pictures = draw_needle(rows, folder)
        for picture in pictures:
            put_line(picture)
    if "check" not in manifest:
        warnings.warn(
            f"{folder}: made before results had check values; whether they are as they were written cannot be told",
            RestKVWarning,
            stacklevel=2,
        )
    put_line(page)

"""`restkv bench`: what methods cost in quality, time and memory. docs/benchmarks.md explains every command.

The restkv command finds this app through the entry point group `restkv.commands`, so that restkv never imports bench.
"""

from __future__ import annotations

import typer

from bench.cli.caches import kept, mask
from bench.cli.documents import documents
from bench.cli.fidelity import fidelity
from bench.cli.likelihood import anli, perplexity, smoothing
from bench.cli.lm_eval import PASS_ON, lm_eval
from bench.cli.published import infinitebench, longbench, needle_official, ruler_official
from bench.cli.report import report
from bench.cli.retrieval import needle, ruler
from bench.cli.speed import compiling, memory, speed

app = typer.Typer(
    name="bench", help="Measure what methods cost in quality, time and memory, on any checkpoint.", no_args_is_help=True
)
app.command()(speed)
app.command()(memory)
app.command("compile")(compiling)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)
app.command()(ruler)
app.command()(needle)
app.command()(fidelity)
app.command()(kept)
app.command()(mask)
app.command()(report)
app.command()(anli)
app.command()(perplexity)
app.command()(smoothing)
app.command()(documents)
app.command("longbench")(longbench)
app.command("infinitebench")(infinitebench)
app.command("ruler-official")(ruler_official)
app.command("needle-official")(needle_official)

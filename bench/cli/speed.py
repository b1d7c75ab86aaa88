"""`restkv bench speed`, `memory` and `compile`: what a token and a context cost, ours and others', eager and compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import METHODS_FORM, parse_numbers, print_table, run_into, split_names
from bench.cli.options import OutOption as FolderOption
from restkv.cli.groups import spread
from restkv.cli.options import FILE_NAME, MOST_ROWS, MOST_SAMPLES, MOST_TEXT, MOST_THREADS, MOST_TOKENS
from restkv.cli.terminal import put_line
from restkv.errors import PromptError
from restkv.files import refusal, write_text

if TYPE_CHECKING:
    from bench.speed.contest import Contest

# Fixed sets of options by name, as `bench speed` takes them.
SUITES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "speed" / "suites.json").read_text())

OutOption = Annotated[Path | None, typer.Option(help="Write the JSON here, and a figure beside it.")]


@dataclass(frozen=True)
class MeasuredOptions:
    """Which model is measured under which of our methods."""

    model: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="A folder, instead of --preset."), FILE_NAME
    ] = None
    preset: Annotated[
        str | None, typer.Option(help="A published shape with random weights; nothing is downloaded.")
    ] = None
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16"
    weights: Annotated[str, typer.Option(help="Of ours: auto (as the checkpoint has them), int8 or int4.")] = "auto"
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    methods: Annotated[str, typer.Option(metavar=METHODS_FORM, help="Ours; full is our full cache.")] = "restkv,full"
    budget: Annotated[int, typer.Option(max=MOST_TOKENS, help="Entries per KV head.")] = 512
    threads: Annotated[int | None, typer.Option(max=MOST_THREADS, help="CPU threads.", show_default="all cores")] = None

    def contest(self, **more: Any) -> Contest:
        """The contest; `more` are fields of it that these options do not name."""
        from bench.speed.contest import PRESETS, Contest

        read = {
            "preset": self.preset or (None if self.model else next(iter(PRESETS))),
            "methods": split_names(self.methods),
            "threads": self.threads or os.cpu_count() or 1,
        }
        return Contest(**vars(self) | read | more)


@dataclass(frozen=True)
class ContestOptions(MeasuredOptions):
    """Who is measured beside them, and on what."""

    contexts: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "2048,8192"
    batches: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1"
    peers: Annotated[
        str,
        typer.Option(help="transformers, transformers-static, kvpress-snapkv, separated by commas; none for nobody."),
    ] = "transformers"
    peer_python: Annotated[
        str | None,
        typer.Option(help="Interpreter that has the peers (bench/speed/peers/README.md).", show_default="this one"),
        FILE_NAME,
    ] = None
    backend: Annotated[str, typer.Option(help="Ours: flex (compiled) or sdpa.")] = "flex"

    def contest(self, **more: Any) -> Contest:
        read = {
            "contexts": parse_numbers(self.contexts, "contexts"),
            "batches": parse_numbers(self.batches, "batches", MOST_ROWS),
            "peers": tuple(peer for peer in split_names(self.peers) if peer != "none"),
        }
        return super().contest(**read | more)


LONGER = ContestOptions(contexts="2048,8192,32768")
EVICTING = MeasuredOptions(methods="restkv,snapkv,h2o,tova,keydiff")


@spread
def speed(
    *,
    options: ContestOptions,
    rounds: Annotated[int, typer.Option(max=MOST_SAMPLES, help="Turns each takes, after one that warms up.")] = 5,
    tokens: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens per turn.")] = 16,
    prefills: Annotated[
        str,
        typer.Option(
            "--prefill", metavar="dense|chunked|PATTERN,...", help="How ours read their prompts: every method each way."
        ),
    ] = "dense",
    prompts: Annotated[
        int, typer.Option(max=MOST_SAMPLES, help="Prompts each reads of every length; TTFT is the median.")
    ] = 1,
    filled: Annotated[
        bool,
        typer.Option(
            "--filled",
            help="Fill the caches with random entries instead of running the prompts: no TTFT, but TPOT of any context.",
        ),
    ] = False,
    start_up: Annotated[
        bool,
        typer.Option(
            "--start-up", help="Also time ours from nothing to a token, with and without kernels made before."
        ),
    ] = False,
    suite: Annotated[str | None, typer.Option(help="gpu: a fixed set of the options above.")] = None,
    out: OutOption = None,
) -> None:
    """Time to the first token and time per token, beside what the machine allows."""
    from bench.speed.contest import measure_speed

    if suite is not None:
        if suite not in SUITES:
            raise PromptError(f"--suite {suite!r} is unknown; choose from {', '.join(SUITES)}")
        fixed = dict(SUITES[suite])
        rounds = fixed.pop("rounds", rounds)
        options = replace(options, **fixed)
    contest = options.contest(
        rounds=rounds, tokens=tokens, prefills=split_names(prefills), prompts=prompts, filled=filled
    )
    _need_figure(contest, out)
    with _in_one_line():
        _finish(measure_speed(contest, put_line, start_up, partial(_write, out=out)), out)


@spread
def memory(
    *,
    options: ContestOptions = LONGER,
    tokens: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens decoded after the prompt.")] = 16,
    out: OutOption = None,
) -> None:
    """Peak memory above the weights, phase by phase."""
    from bench.speed.contest import measure_memory

    contest = options.contest(rounds=1, tokens=tokens)
    _need_figure(contest, out)
    with _in_one_line():
        _finish(measure_memory(contest, put_line, partial(_write, out=out)), out)


@spread
def compiling(
    *,
    options: MeasuredOptions = EVICTING,
    context: Annotated[int, typer.Option(min=1, max=MOST_TEXT, help="Tokens of a prompt.")] = 4096,
    prefill: Annotated[
        str, typer.Option(metavar="PATTERN|dense", help="The sparse prefill that is measured; dense: none.")
    ] = "a-shape:local=1024",
    rounds: Annotated[int, typer.Option(max=MOST_SAMPLES, help="Turns each takes, after one that warms up.")] = 5,
    tokens: Annotated[int, typer.Option(max=MOST_TEXT, help="Decode steps per turn.")] = 16,
    jobs: Annotated[
        int, typer.Option(min=0, max=MOST_SAMPLES, help="Random jobs over which graphs are counted; 0: none.")
    ] = 200,
    out: FolderOption = Path("bench-compile"),
) -> None:
    """Decode steps, evictions, prompts: eager and compiled, and after how many tokens compiling has paid."""
    from bench.speed.compiling import CompilePlan

    contest = options.contest(
        contexts=(context,),
        batches=(1,),
        peers=(),
        peer_python=None,
        backend="flex",
        rounds=rounds,
        tokens=tokens,
        prefills=(prefill,),
    )
    plan = CompilePlan(contest, jobs)
    with _in_one_line():
        run_into(plan.kind, out, plan.run)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A contestant's process that dies, for lack of memory as a rule, is one line."""
    from bench.speed.workers import WorkerDied

    try:
        yield
    except WorkerDied as error:
        raise PromptError(f"{error}; what was measured before it is in --out") from None


def _need_figure(contest: Contest, out: Path | None) -> None:
    """Refuse at once a figure that could not be drawn in the end (raises OutputError)."""
    if out is not None and len(contest.contexts) > 1:
        from bench.report.figures import need_matplotlib

        need_matplotlib()


def _write(result: dict[str, Any], out: Path | None) -> None:
    """The JSON of a run, complete or not."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(out, error) from None
    write_text(out, json.dumps(result, indent=1) + "\n")


def _finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the table; write the JSON and, of several contexts, a figure."""
    from bench.report.figures import save_png
    from bench.speed.shown import figure, table, title
    from restkv.cli.console import table_console

    print_table(table_console(), title(result), *table(result))
    if out is None:
        return
    _write(result, out)
    put_line(out)
    if len(result["contest"]["contexts"]) > 1:
        picture = out.with_suffix(".png")
        save_png(figure(result), picture)
        put_line(picture)

"""What the commands of `restkv bench` have in common: options, how texts become values, a run's progress and its tables.

torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.runs.benchmark import EAGER
from modeling.text.characters import brief
from restkv.cli.options import FILE_NAME, MOST_TEXT, MOST_TOKENS, RECALL, LoadOptions, ModelArgument
from restkv.errors import PromptError

if TYPE_CHECKING:
    from rich.console import Console

    from bench.runs.folder import Report
    from bench.runs.run import Plan
    from restkv.lm import LM

RIVALS = "restkv,snapkv,pyramidkv,adakv,h2o,tova,streamingllm,lacache,expected-attention,random"
METHODS_FORM = "NAME[@PRESET][:OPTION=VALUE...],..."

MethodsOption = Annotated[str, typer.Option(metavar=METHODS_FORM, help="Methods; the full cache always runs too.")]
CompressionOption = Annotated[str, typer.Option(help="Length over entries per KV head.")]
PrefillOption = Annotated[
    str, typer.Option(metavar="dense|PATTERN", help="How prompts are read; see `restkv generate --help`.")
]
QuestionOption = Annotated[
    str, typer.Option(help="aware: evict with the question in sight; agnostic: before it is known; both.")
]
EvictOption = Annotated[
    str,
    typer.Option(help="prompt: evict the prompt, keep what follows; always: also while decoding, as the method does."),
]
SeedOption = Annotated[int, typer.Option(help="Of the samples.")]
OutOption = Annotated[Path, typer.Option(help="Folder of the results; a run that was stopped there goes on.")]
EAGERLY = LoadOptions(backend=EAGER)


@dataclass(frozen=True)
class ModelChoice:
    """The model of a command that takes one as its argument or as --model."""

    model: ModelArgument = str(RECALL)
    named: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The model, where it is not given as the argument."),
        FILE_NAME,
    ] = None

    @property
    def path(self) -> str:
        """Its folder or name.

        Raises:
            PromptError: two are given.
        """
        if self.named is not None and self.model != str(RECALL):
            raise PromptError(f"two models are given, {self.model} and --model {self.named}; give one")
        return self.named or self.model


# -- texts to values


def split_names(text: str) -> tuple[str, ...]:
    """What stands between commas, nothing twice."""
    return tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))


def parse_numbers(text: str, option: str, most: int = MOST_TEXT) -> tuple[int, ...]:
    """Whole numbers from 1 to `most`.

    Raises:
        PromptError: names the option.
    """
    try:
        numbers = tuple(dict.fromkeys(map(int, split_names(text))))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise PromptError(f"--{option} {brief(text)}: give whole numbers of at least 1, separated by commas")
    if max(numbers) > most:
        raise PromptError(f"--{option} {max(numbers)}: give whole numbers of at most {most}")
    return numbers


def parse_compression(text: str) -> tuple[float, ...]:
    """Numbers; that they are at least 1 is for the plan to say, which knows what they are of.

    Raises:
        PromptError: no numbers.
    """
    try:
        rates = tuple(dict.fromkeys(map(float, split_names(text))))
    except ValueError:
        rates = ()
    if not rates:
        raise PromptError(f"--compression {text!r}: give numbers of at least 1, separated by commas")
    return rates


def parse_budgets(text: str) -> tuple[int | float, ...]:
    """Entries, or (with a point) fractions of what is read.

    Raises:
        PromptError: anything else.
    """
    try:
        numbers = (float(part) if "." in part else int(part) for part in split_names(text))
        budgets = tuple({repr(number): number for number in numbers}.values())  # 1 entry is not 1.0, which is all
    except ValueError:
        budgets = ()
    if not all(0 < budget <= 1 if isinstance(budget, float) else budget > 0 for budget in budgets) or not budgets:
        raise PromptError(f"--budgets {text!r}: give whole numbers, or fractions in (0, 1], separated by commas")
    if max(budgets) > MOST_TOKENS:
        raise PromptError(f"--budgets {max(budgets)}: give whole numbers of at most {MOST_TOKENS}")
    return budgets


def evicts_once(evict: str) -> bool:
    """Whether --evict leaves alone what follows the prompt.

    Raises:
        PromptError: neither of its values.
    """
    if evict not in ("prompt", "always"):
        raise PromptError(f"--evict {evict!r} is not known; choose prompt or always")
    return evict == "prompt"


# -- runs


def run_plan(lm: LM, plan: Plan, out: Path) -> None:
    """Run a plan on a model into `out`; see run_into. Raises what bench.runs.run.run does."""
    from bench.runs.run import run

    run_into(plan.kind, out, partial(run, lm, plan))


def run_into(kind: str, out: Path, work: Callable[[Path, Report | None], object]) -> None:
    """Have `work` fill the folder `out` with a run of a benchmark, draw its progress meanwhile, and show its tables when it is
    done.

    Raises:
        OutputError: the benchmark draws pictures and matplotlib is missing (before anything is run).
    """
    from bench.report.figures import need_matplotlib
    from bench.report.kinds import draw_pictures
    from bench.runs.benchmark import benchmark
    from restkv.cli.terminal import put_line

    if benchmark(kind).pictures is not None:
        need_matplotlib()
    with _progress_bar() as report:
        work(out, report)
    pictures = draw_pictures(out)
    _print_tables(out)
    for picture in pictures:
        put_line(picture)


def print_table(console: Console, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns and lines of text under their title."""
    from rich.table import Table

    from restkv.cli.display import titled

    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    console.print(titled(title, table))


@contextmanager
def _progress_bar() -> Iterator[Report | None]:
    """How far the run is, on stderr; None where no terminal shows it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from restkv.cli.console import PlainConsole

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=PlainConsole(stderr=True), transient=True) as bar:
        task = bar.add_task("results", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_tables(folder: Path) -> None:
    """The tables of a run, and how to make a page of it."""
    from bench.report.kinds import parts, read_run
    from bench.runs.benchmark import Table
    from bench.runs.folder import SAMPLES
    from restkv.cli.console import table_console

    manifest, rows = read_run(folder)
    console = table_console(piped=200)  # a file need not break lines
    for part in parts(manifest["kind"], manifest["arguments"], rows):
        if isinstance(part, Table):
            print_table(console, part.caption, part.columns, part.lines)
    console.print(f"results: {folder / SAMPLES}; a page with figures: restkv bench report {folder}", soft_wrap=True)

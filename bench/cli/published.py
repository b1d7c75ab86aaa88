"""`restkv bench longbench`, `ruler-official`, `needle-official`, `infinitebench`: the published benchmarks on local files.

docs/published-benchmarks.md explains them. torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import (
    EAGERLY,
    MethodsOption,
    ModelChoice,
    OutOption,
    parse_budgets,
    parse_numbers,
    run_plan,
    split_names,
)
from modeling.text.characters import brief
from restkv.cli.groups import spread
from restkv.cli.options import MOST_DEPTHS, MOST_SAMPLES, MOST_TEXT, MOST_TOKENS, LoadOptions
from restkv.errors import PromptError

if TYPE_CHECKING:
    from bench.published.run import Plan
    from bench.published.suite import Suite

RIVALS = "restkv,snapkv,pyramidkv,adakv,h2o,tova,streamingllm"
MOST_LENGTHS = 10_000  # of a range
NEEDLE_LENGTHS = "1000:32000:200"  # as in the paper's script
DataOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder with the benchmark's own files.")]
TasksOption = Annotated[str, typer.Option(help="Names separated by commas; all takes those that there are files of.")]
BudgetsOption = Annotated[
    str, typer.Option(help="Entries per head, window included, as the papers count; or fractions of the prompt.")
]
ProtocolOption = Annotated[str, typer.Option(help="official, or restkv-paper: as the paper's code runs it.")]
TemplatesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Clone of the benchmark's repository, or its file of prompt templates (read, never run).",
        show_default="our own wording, as results then say",
    ),
]


@dataclass(frozen=True)
class PartOptions:
    """How much of a benchmark is run."""

    limit: Annotated[int | None, typer.Option(max=MOST_SAMPLES, help="Rows per file at most.")] = None
    fraction: Annotated[float, typer.Option(help="Of each file's rows, spread evenly over it.")] = 1.0
    max_length: Annotated[
        int | None,
        typer.Option(
            max=MOST_TOKENS,
            help="Longest prompt in tokens; longer ones lose their middle.",
            show_default="the protocol's",
        ),
    ] = None


WHOLE = PartOptions()


def _by_task(kind: str, title: str, default_budgets: str) -> Callable[..., None]:
    """The command of a benchmark whose files are DIR/TASK.jsonl."""

    def command(
        *,
        data: DataOption,
        chosen: ModelChoice,
        tasks: TasksOption = "all",
        methods: MethodsOption = RIVALS,
        budgets: BudgetsOption = default_budgets,
        protocol: ProtocolOption = "official",
        templates: TemplatesOption = None,
        part: PartOptions,
        out: OutOption = Path(f"bench-{kind}"),
        where: LoadOptions = EAGERLY,
    ) -> None:
        from bench.published.infinitebench import infinitebench
        from bench.published.longbench import longbench

        lm = where.load(chosen.path)
        suite_of = {"longbench": longbench, "infinitebench": infinitebench}[kind]
        suite = suite_of(lm, data, _tasks(tasks), protocol, templates)
        run_plan(lm, _plan(suite, chosen, methods, budgets, part), out)

    command.__doc__ = f"{title}, from DIR/TASK.jsonl."
    return spread(command)


longbench = _by_task("longbench", "LongBench, 16 English and code tasks", "64,128,256,512,1024")
infinitebench = _by_task("infinitebench", "InfiniteBench, 12 tasks", "1024")


@spread
def ruler_official(
    *,
    data: DataOption,
    chosen: ModelChoice,
    tasks: TasksOption = "all",
    lengths: Annotated[
        str | None, typer.Option(help="Subfolders of DIR, separated by commas.", show_default="all there are")
    ] = None,
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "1024",
    protocol: ProtocolOption = "official",
    part: PartOptions,
    out: OutOption = Path("bench-ruler-official"),
    where: LoadOptions = EAGERLY,
) -> None:
    """RULER, 13 tasks, from files that its own generator made: DIR/LENGTH/TASK.jsonl."""
    from bench.published.ruler import ruler

    lm = where.load(chosen.path)
    suite = ruler(lm, data, _tasks(tasks), parse_numbers(lengths, "lengths") if lengths else None, protocol)
    run_plan(lm, _plan(suite, chosen, methods, budgets, part), out)


@spread
def needle_official(
    *,
    data: DataOption,
    chosen: ModelChoice,
    lengths: Annotated[
        str, typer.Option(help="Tokens, 200 of them left free: numbers separated by commas, or FIRST:LAST:STEP.")
    ] = NEEDLE_LENGTHS,
    depths: Annotated[
        int, typer.Option(max=MOST_DEPTHS, help="Depths of the needle, evenly from beginning to end.")
    ] = 10,
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "128,1024",
    protocol: ProtocolOption = "restkv-paper",
    templates: TemplatesOption = None,
    out: OutOption = Path("bench-needle-official"),
    where: LoadOptions = EAGERLY,
) -> None:
    """A needle in essays (DIR/*.txt); official scores it by ROUGE-1, restkv-paper by the words found."""
    from bench.published.haystack import haystack
    from bench.report.figures import need_matplotlib

    need_matplotlib()
    lm = where.load(chosen.path)
    suite = haystack(lm, data, _range(lengths), depths, protocol, templates)
    run_plan(lm, _plan(suite, chosen, methods, budgets), out)


def _tasks(text: str) -> tuple[str, ...] | None:
    return None if text == "all" else split_names(text)


def _range(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if len(parts) != 3:
        return parse_numbers(text, "lengths")
    try:
        first, last, step = map(int, parts)
        if last > MOST_TEXT or len(range(first, last + 1, step)) > MOST_LENGTHS:
            raise PromptError(
                f"--lengths {brief(text)}: give lengths of at most {MOST_TEXT}, and no more than {MOST_LENGTHS}"
            )
        lengths = tuple(range(first, last + 1, step))
    except PromptError:
        raise
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise PromptError(
            f"--lengths {text!r}: give FIRST:LAST:STEP in whole numbers, the last no smaller than the first"
        )
    return lengths


def _plan(suite: Suite, chosen: ModelChoice, methods: str, budgets: str, part: PartOptions = WHOLE) -> Plan:
    from bench.published.run import Plan
    from bench.published.suite import PAPER
    from bench.runs.methods import parse_methods

    repo, at, revision = chosen.path.partition("@")
    is_folder = Path(chosen.path).is_dir()
    name = Path(chosen.path).resolve().name if is_folder else repo.rpartition("/")[2] + at + revision
    rivals = parse_methods(methods, once=suite.protocol == PAPER)  # its code evicts the prompt and nothing after it
    return Plan(suite, name, tuple(rivals), parse_budgets(budgets), **vars(part))

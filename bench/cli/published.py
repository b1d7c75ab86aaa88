"""`restkv bench longbench`, `ruler-official`, `needle-official`, `infinitebench`: the published benchmarks on local files.

docs/published-benchmarks.md explains them. torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import (
    EAGER,
    MethodsOption,
    NamedModelOption,
    OutOption,
    load_model,
    parse_budgets,
    parse_numbers,
    pick_model,
    run_plan,
    split_names,
)
from restkv.cli.options import RECALL, BackendOption, DeviceOption, DtypeOption, ModelArgument
from restkv.errors import PromptError

if TYPE_CHECKING:
    from bench.published.suite import Suite
    from restkv.lm import LM

RIVALS = "restkv,snapkv,pyramidkv,adakv,h2o,tova,streamingllm"
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
LimitOption = Annotated[int | None, typer.Option(help="Rows per file at most.")]
FractionOption = Annotated[float, typer.Option(help="Of each file's rows, spread evenly over it.")]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Longest prompt in tokens; longer ones lose their middle.", show_default="the protocol's"),
]


def _by_task(kind: str, title: str, default_budgets: str) -> Callable[..., None]:
    """The command of a benchmark whose files are DIR/TASK.jsonl."""

    def command(
        data: DataOption,
        model: ModelArgument = str(RECALL),
        named_model: NamedModelOption = None,
        tasks: TasksOption = "all",
        methods: MethodsOption = RIVALS,
        budgets: BudgetsOption = default_budgets,
        protocol: ProtocolOption = "official",
        templates: TemplatesOption = None,
        limit: LimitOption = None,
        fraction: FractionOption = 1.0,
        max_length: LengthOption = None,
        out: OutOption = Path(f"bench-{kind}"),
        dtype: DtypeOption = "auto",
        device: DeviceOption = "auto",
        backend: BackendOption = EAGER,
    ) -> None:
        from bench.published.infinitebench import infinitebench
        from bench.published.longbench import longbench

        name, lm = _model(model, named_model, dtype, device, backend)
        suite_of = {"longbench": longbench, "infinitebench": infinitebench}[kind]
        suite = suite_of(lm, data, _tasks(tasks), protocol, templates)
        _run(lm, name, suite, methods, budgets, out, limit, fraction, max_length)

    command.__doc__ = f"{title}, from DIR/TASK.jsonl."
    return command


longbench = _by_task("longbench", "LongBench, 16 English and code tasks", "64,128,256,512,1024")
infinitebench = _by_task("infinitebench", "InfiniteBench, 12 tasks", "1024")


def ruler_official(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModelOption = None,
    tasks: TasksOption = "all",
    lengths: Annotated[
        str | None, typer.Option(help="Subfolders of DIR, separated by commas.", show_default="all there are")
    ] = None,
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "1024",
    protocol: ProtocolOption = "official",
    limit: LimitOption = None,
    fraction: FractionOption = 1.0,
    max_length: LengthOption = None,
    out: OutOption = Path("bench-ruler-official"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """RULER, 13 tasks, from files that its own generator made: DIR/LENGTH/TASK.jsonl."""
    from bench.published.ruler import ruler as suite_of

    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _tasks(tasks), parse_numbers(lengths, "lengths") if lengths else None, protocol)
    _run(lm, name, suite, methods, budgets, out, limit, fraction, max_length)


def needle_official(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModelOption = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens, 200 of them left free: numbers separated by commas, or FIRST:LAST:STEP.")
    ] = NEEDLE_LENGTHS,
    depths: Annotated[int, typer.Option(help="Depths of the needle, evenly from beginning to end.")] = 10,
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "128,1024",
    protocol: ProtocolOption = "restkv-paper",
    templates: TemplatesOption = None,
    out: OutOption = Path("bench-needle-official"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """A needle in essays (DIR/*.txt); official scores it by ROUGE-1, restkv-paper by the words found."""
    from bench.published.haystack import haystack as suite_of
    from bench.report.figures import need_matplotlib

    need_matplotlib()
    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _range(lengths), depths, protocol, templates)
    _run(lm, name, suite, methods, budgets, out)


def _model(model: str, named: str | None, dtype: str, device: str, backend: str) -> tuple[str, LM]:
    """The model and the name it goes by."""
    chosen = pick_model(model, named)
    repo, at, revision = chosen.partition("@")
    name = Path(chosen).resolve().name if Path(chosen).is_dir() else repo.rpartition("/")[2] + at + revision
    return name, load_model(chosen, dtype, device, backend)


def _tasks(text: str) -> tuple[str, ...] | None:
    return None if text == "all" else split_names(text)


def _range(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if len(parts) != 3:
        return parse_numbers(text, "lengths")
    try:
        lengths = tuple(range(int(parts[0]), int(parts[1]) + 1, int(parts[2])))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise PromptError(
            f"--lengths {text!r}: give FIRST:LAST:STEP in whole numbers, the last no smaller than the first"
        )
    return lengths


def _run(
    lm: LM,
    name: str,
    suite: Suite,
    methods: str,
    budgets: str,
    out: Path,
    limit: int | None = None,
    fraction: float = 1.0,
    max_length: int | None = None,
) -> None:
    from bench.published.run import Plan
    from bench.published.suite import PAPER
    from bench.runs.methods import parse_methods

    chosen = parse_methods(methods, once=suite.protocol == PAPER)  # its code evicts the prompt and nothing after it
    plan = Plan(suite, name, tuple(chosen), parse_budgets(budgets), limit, fraction, max_length)
    run_plan(lm, plan, out)

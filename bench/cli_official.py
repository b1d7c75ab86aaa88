"""`restkv bench longbench`, `ruler-official`, `needle-official`, `infinitebench`: the published benchmarks on local files.

docs/published-benchmarks.md explains them. torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import EAGER, MethodsOption, OutOption, _bar, _budgets, _load, _names, _numbers, _show, app
from restkv.errors import PromptError
from restkv.options import RECALL, BackendOption, DeviceOption, DtypeOption, ModelArgument

if TYPE_CHECKING:
    from bench.official.suite import Suite
    from restkv.lm import LM

RIVALS = "restkv,snapkv,pyramidkv,adakv,h2o,tova,streamingllm"
NEEDLE_LENGTHS = "1000:32000:200"  # as in the paper's script
DataOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder with the benchmark's own files.")]
NamedModel = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The model, where it is not given as the argument.")
]
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


@app.command()
def longbench(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModel = None,
    tasks: TasksOption = "all",
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "64,128,256,512,1024",
    protocol: ProtocolOption = "official",
    templates: TemplatesOption = None,
    limit: LimitOption = None,
    fraction: FractionOption = 1.0,
    max_length: LengthOption = None,
    out: OutOption = Path("bench-longbench"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """LongBench, 16 English and code tasks, from DIR/TASK.jsonl."""
    from bench.official.longbench import longbench as suite_of

    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _tasks(tasks), protocol, templates)
    _run(lm, name, suite, methods, budgets, out, limit, fraction, max_length)


@app.command()
def infinitebench(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModel = None,
    tasks: TasksOption = "all",
    methods: MethodsOption = RIVALS,
    budgets: BudgetsOption = "1024",
    protocol: ProtocolOption = "official",
    templates: TemplatesOption = None,
    limit: LimitOption = None,
    fraction: FractionOption = 1.0,
    max_length: LengthOption = None,
    out: OutOption = Path("bench-infinitebench"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """InfiniteBench, 12 tasks, from DIR/TASK.jsonl."""
    from bench.official.infinitebench import infinitebench as suite_of

    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _tasks(tasks), protocol, templates)
    _run(lm, name, suite, methods, budgets, out, limit, fraction, max_length)


@app.command("ruler-official")
def ruler_official(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModel = None,
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
    from bench.official.ruler import ruler as suite_of

    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _tasks(tasks), _numbers(lengths, "lengths") if lengths else None, protocol)
    _run(lm, name, suite, methods, budgets, out, limit, fraction, max_length)


@app.command("needle-official")
def needle_official(
    data: DataOption,
    model: ModelArgument = str(RECALL),
    named_model: NamedModel = None,
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
    from bench.figures import need_matplotlib
    from bench.official.haystack import haystack as suite_of

    need_matplotlib()
    name, lm = _model(model, named_model, dtype, device, backend)
    suite = suite_of(lm, data, _range(lengths), depths, protocol, templates)
    _run(lm, name, suite, methods, budgets, out)


def _model(model: str, named: str | None, dtype: str, device: str, backend: str) -> tuple[str, LM]:
    """The model and the name it goes by."""
    if named is not None and model != str(RECALL):
        raise PromptError(f"two models are given, {model} and --model {named}; give one")
    chosen = named or model
    return Path(chosen).resolve().name if Path(chosen).is_dir() else chosen.rpartition("/")[2], _load(
        chosen, dtype, device, backend
    )


def _tasks(text: str) -> list[str] | None:
    return None if text == "all" else _names(text)


def _range(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if len(parts) != 3:
        return _numbers(text, "lengths")
    first, last, step = _numbers(",".join(parts), "lengths")
    return tuple(range(first, last + 1, step))


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
    from bench.methods import parse_methods
    from bench.official.run import Plan, run
    from bench.official.suite import PAPER

    chosen = parse_methods(methods, once=suite.protocol == PAPER)  # its code evicts the prompt and nothing after it
    plan = Plan(suite, name, tuple(chosen), _budgets(budgets), limit, fraction, max_length)
    with _bar() as report:
        run(lm, plan, out, report)
    _show(out)

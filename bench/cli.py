"""`restkv bench`: what methods cost in quality, with intervals. docs/benchmarks.md explains every command.

The restkv command finds this app through the entry point group `restkv.commands`, so that restkv never imports bench.
torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench import cli_speed
from bench.cli_harness import PASS_ON, lm_eval
from restkv.errors import PromptError
from restkv.options import RECALL, BackendOption, DeviceOption, DtypeOption, ModelArgument

if TYPE_CHECKING:
    from restkv.lm import LM

EAGER = "sdpa"  # every budget is a cache of another shape, and compiling for each takes longer than its short answers
RIVALS = "restkv,snapkv,pyramidkv,adakv,h2o,tova,streamingllm,lacache,expected-attention,random"

app = typer.Typer(
    name="bench", help="Measure what methods cost in quality, time and memory, on any checkpoint.", no_args_is_help=True
)
app.command()(cli_speed.speed)
app.command()(cli_speed.memory)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)

MethodsOption = Annotated[
    str, typer.Option(metavar="NAME[@PRESET][:OPTION=VALUE...],...", help="Methods; the full cache always runs too.")
]
OutOption = Annotated[Path, typer.Option(help="Folder of the results; a run that was stopped there goes on.")]
EvictOption = Annotated[
    str,
    typer.Option(help="prompt: evict the prompt, keep what follows; always: also while decoding, as the method does."),
]
ChatOption = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Ask through the chat template.", show_default="if there is one"),
]
SeedOption = Annotated[int, typer.Option(help="Of the samples.")]
PrefillOption = Annotated[
    str, typer.Option(metavar="dense|PATTERN", help="How prompts are read; see `restkv generate --help`.")
]
QuestionOption = Annotated[
    str, typer.Option(help="aware: evict with the question in sight; agnostic: before it is known; both.")
]


@app.command()
def ruler(
    model: ModelArgument = str(RECALL),
    tasks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together.")] = "1024",
    methods: MethodsOption = RIVALS,
    compression: Annotated[str, typer.Option(help="Length over entries per KV head.")] = "8,16,32",
    samples: Annotated[int, typer.Option(help="Per task and length.")] = 20,
    question: QuestionOption = "both",
    evict: EvictOption = "prompt",
    seed: SeedOption = 0,
    chat: ChatOption = None,
    prefill: PrefillOption = "dense",
    out: OutOption = Path("bench-ruler"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """Retrieval: task x length x method x compression, accuracy with 95 % intervals."""
    from bench.methods import parse_methods
    from bench.ruler import Plan, run
    from bench.tasks import TASKS

    lm = _load(model, dtype, device, backend)
    plan = Plan(
        tuple(TASKS) if tasks == "all" else tuple(_names(tasks)),
        _numbers(lengths, "lengths"),
        tuple(parse_methods(methods, _once(evict))),
        _rates(compression),
        samples,
        question,
        seed,
        _chat(lm, chat),
        prefill=prefill,
    )
    with _bar() as report:
        run(lm, plan, out, report=report)
    _show(out)


@app.command()
def needle(
    model: ModelArgument = str(RECALL),
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together.")] = "256,512,1024",
    depths: Annotated[int, typer.Option(help="Depths of the needle, evenly from beginning to end.")] = 5,
    methods: MethodsOption = RIVALS,
    compression: Annotated[float, typer.Option(help="Length over entries per KV head.")] = 16.0,
    samples: Annotated[int, typer.Option(help="Per depth and length.")] = 4,
    question: QuestionOption = "both",
    evict: EvictOption = "prompt",
    seed: SeedOption = 0,
    chat: ChatOption = None,
    prefill: PrefillOption = "dense",
    out: OutOption = Path("bench-needle"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """One needle at every depth of every length: a heat map for each method."""
    from bench.methods import parse_methods
    from bench.needle import needle_plan, run_needle

    lm = _load(model, dtype, device, backend)
    plan = needle_plan(
        _numbers(lengths, "lengths"),
        depths,
        parse_methods(methods, _once(evict)),
        compression,
        samples,
        question=question,
        seed=seed,
        chat=_chat(lm, chat),
        prefill=prefill,
    )
    with _bar() as report:
        pictures = run_needle(lm, plan, out, report)
    _show(out)
    for picture in pictures:
        print(picture)


@app.command()
def fidelity(
    model: ModelArgument = str(RECALL),
    text: Annotated[
        Path, typer.Option(help="UTF-8 text to read.", show_default="a story that comes with restkv")
    ] = RECALL / "story.txt",
    methods: MethodsOption = RIVALS,
    budgets: Annotated[str, typer.Option(help="Entries per KV head, or fractions of the context.")] = "32,64,128",
    context: Annotated[int, typer.Option(help="Tokens before the eviction.")] = 384,
    tail: Annotated[int, typer.Option(help="Tokens compared after it.")] = 64,
    windows: Annotated[int, typer.Option(help="Pieces of the text, spread evenly over it.")] = 16,
    oracle: Annotated[int, typer.Option(help="So many of them also against greedy elimination.")] = 4,
    oracle_context: Annotated[int, typer.Option(help="Tokens of context for that.")] = 128,
    prefill: PrefillOption = "dense",
    out: OutOption = Path("bench-fidelity"),
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """Teacher-forced comparison with the full cache on any text, and the oracle gap."""
    from bench.fidelity import FidelityPlan, run_fidelity
    from bench.methods import parse_methods

    content = _read(text)
    lm = _load(model, dtype, device, backend)
    plan = FidelityPlan(
        content,
        tuple(parse_methods(methods)),
        _budgets(budgets),
        context,
        tail,
        windows,
        oracle,
        oracle_context,
        prefill,
    )
    with _bar() as report:
        run_fidelity(lm, plan, out, report)
    _show(out)


@app.command()
def kept(
    model: ModelArgument = str(RECALL),
    prompt_file: Annotated[Path | None, typer.Option(help="The prompt; without one, a sample of --task.")] = None,
    mark: Annotated[list[str] | None, typer.Option(help="Point out this part of the prompt; may be repeated.")] = None,
    task: Annotated[str, typer.Option(help="A task of `restkv bench ruler`.")] = "niah_single",
    length: Annotated[int, typer.Option("--length", "--context", help="Its tokens.")] = 512,
    depth: Annotated[float | None, typer.Option(help="Where its needle is, from 0 to 1.")] = None,
    seed: SeedOption = 0,
    question: Annotated[bool, typer.Option("--question/--no-question", help="With the question in sight.")] = True,
    methods: MethodsOption = "restkv,snapkv,h2o,streamingllm",
    budget: Annotated[int, typer.Option(help="Entries per KV head.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Also draw a picture, PNG.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = EAGER,
) -> None:
    """Show which positions of a prompt each layer and head kept: a needle that survives, or dies."""
    from bench.figures import need_matplotlib, save_png
    from bench.kept import find_marks, kept_figure, look, terminal
    from bench.methods import check, equal_bytes, parse_methods
    from bench.tasks import Frame, make_sample
    from restkv.display import table_console

    if out is not None:
        need_matplotlib()
    lm = _load(model, dtype, device, backend)
    assert lm.tokenizer is not None
    marks = list(mark or ())
    if prompt_file is not None:
        prompt = _read(prompt_file)
    else:
        sample = make_sample(task, length, seed, 0, Frame(lm.tokenizer), depth)
        prompt = f"{sample.context} {sample.question} {sample.answer_prefix}" if question else sample.context
        marks = marks or [needle for needle, _ in sample.meta.get("needles", ()) if _asked(needle, sample)]
    ids = lm.encode(prompt)
    policies = []
    for method in parse_methods(methods):
        if not method.full:
            check(lm, method, budget, len(ids), f"a prompt of {len(ids)} tokens")
            policies.append((method.label, equal_bytes(lm, method, budget, lambda: ids)))
    seen = look(lm, ids, policies, find_marks(lm, prompt, marks))
    console = table_console()
    for one in seen:
        for line in terminal(one, console.width - 9):
            console.print(line)
        console.print()
    if out is not None:
        save_png(kept_figure(seen), out)
        print(out)


@app.command()
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
    if plain_json:
        import json

        from bench.report import as_json

        print(json.dumps(as_json(folder), indent=1, ensure_ascii=False))
        return
    if as_markdown or as_latex:
        from bench.report import latex, markdown

        print(markdown(folder) if as_markdown else latex(folder), end="")
        return
    from bench.needle import draw_needle
    from bench.report import write_report
    from bench.runs import read_manifest, read_rows

    page = write_report(folder)
    if read_manifest(folder)["kind"] == "needle":
        for picture in draw_needle(read_rows(folder), folder):
            print(picture)
    print(page)


# -- what the commands share


def _load(model: str, dtype: str, device: str, backend: str) -> LM:
    from restkv.lm import load

    return load(model, dtype=dtype, device=device, backend=backend)


def _chat(lm: LM, chat: bool | None) -> bool:
    assert lm.tokenizer is not None, "a folder without a tokenizer is refused when it is loaded"
    return lm.tokenizer.has_chat_template if chat is None else chat


def _once(evict: str) -> bool:
    if evict not in ("prompt", "always"):
        raise PromptError(f"--evict {evict!r} is not known; choose prompt or always")
    return evict == "prompt"


def _asked(needle: str, sample: Any) -> bool:
    return any(answer in needle for answer in sample.answers)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(map(int, _names(text)))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise PromptError(f"--{option} {text!r}: give whole numbers of at least 1, separated by commas")
    return numbers


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, _names(text)))
    except ValueError:
        rates = ()
    if not rates:
        raise PromptError(f"--compression {text!r}: give numbers of at least 1, separated by commas")
    return rates


def _budgets(text: str) -> tuple[int | float, ...]:
    try:
        budgets = tuple(float(part) if "." in part else int(part) for part in _names(text))
    except ValueError:
        budgets = ()
    if not all(0 < budget <= 1 if isinstance(budget, float) else budget > 0 for budget in budgets) or not budgets:
        raise PromptError(f"--budgets {text!r}: give whole numbers, or fractions in (0, 1], separated by commas")
    return budgets


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """How far the run is, on stderr; None where no terminal shows it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("results", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(folder: Path) -> None:
    """Print the tables of a run, and how to make a page of it."""
    from rich.console import Console
    from rich.table import Table as RichTable

    from bench.runs import SAMPLES, read_manifest, read_rows
    from bench.tables import Table, parts
    from restkv.display import titled

    manifest = read_manifest(folder)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)  # tables that a file need not wrap
    for part in parts(manifest["kind"], manifest["arguments"], read_rows(folder)):
        if isinstance(part, Table):
            shown = RichTable(*part.columns)
            for line in part.lines:
                shown.add_row(*line)
            console.print(titled(part.caption, shown))
    console.print(f"results: {folder / SAMPLES}; a page with figures: restkv bench report {folder}", soft_wrap=True)


from bench import cli_likelihood, cli_official  # noqa: E402, F401 - they register their commands on `app`

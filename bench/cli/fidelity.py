"""`restkv bench fidelity` and `kept`: how near to the full cache a compressed one is, and what it has kept of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import (
    EAGERLY,
    RIVALS,
    EvictOption,
    MethodsOption,
    OutOption,
    PrefillOption,
    SeedOption,
    evicts_once,
    parse_budgets,
    run_plan,
    split_names,
)
from restkv.cli.groups import spread
from restkv.cli.options import MOST_SAMPLES, MOST_TEXT, MOST_TOKENS, RECALL, LoadOptions, ModelArgument, read_text
from restkv.cli.terminal import put_line
from restkv.errors import OutputError, PromptError

if TYPE_CHECKING:
    from bench.quality.tasks import Sample


@spread
def fidelity(
    *,
    model: ModelArgument = str(RECALL),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to read.", show_default="a story that comes with restkv")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of a text: questions of these tasks of `restkv bench ruler`, answered by teacher forcing."
        ),
    ] = None,
    methods: MethodsOption = RIVALS,
    budgets: Annotated[str, typer.Option(help="Entries per KV head, or fractions of the context.")] = "32,64,128",
    context: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens before the eviction.")] = 384,
    tail: Annotated[
        int, typer.Option(max=MOST_TEXT, help="Tokens compared after it; of questions, the answer's.")
    ] = 64,
    windows: Annotated[
        int,
        typer.Option(max=MOST_SAMPLES, help="Pieces of the text, spread evenly over it; or questions of each task."),
    ] = 16,
    oracle: Annotated[int, typer.Option(max=MOST_SAMPLES, help="So many of them also against greedy elimination.")] = 4,
    oracle_context: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens of context for that.")] = 128,
    evict: EvictOption = "prompt",
    prefill: PrefillOption = "dense",
    seed: SeedOption = 0,
    out: OutOption = Path("bench-fidelity"),
    where: LoadOptions = EAGERLY,
) -> None:
    """Teacher-forced comparison with the full cache on any text, and the oracle gap."""
    from bench.quality.fidelity import FidelityPlan, Questions
    from bench.runs.methods import parse_methods

    source: str | Questions
    if tasks is not None:
        if text is not None:
            raise PromptError("two sources: give --text or --tasks, not both")
        source = Questions(tuple(split_names(tasks)), seed)
    else:
        text = text or RECALL / "story.txt"
        source = read_text(text)
    lm = where.load(model)
    plan = FidelityPlan(
        source,
        tuple(parse_methods(methods, evicts_once(evict))),
        parse_budgets(budgets),
        context=context,
        tail=tail,
        windows=windows,
        oracle=oracle,
        oracle_context=oracle_context,
        prefill=prefill,
    )
    run_plan(lm, plan, out)


@spread
def kept(
    *,
    model: ModelArgument = str(RECALL),
    prompt_file: Annotated[Path | None, typer.Option(help="The prompt; without one, a sample of --task.")] = None,
    mark: Annotated[list[str] | None, typer.Option(help="Point out this part of the prompt; may be repeated.")] = None,
    task: Annotated[str, typer.Option(help="A task of `restkv bench ruler`.")] = "niah_single",
    length: Annotated[int, typer.Option("--length", "--context", max=MOST_TEXT, help="Its tokens.")] = 512,
    depth: Annotated[float | None, typer.Option(help="Where its needle is, from 0 to 1.")] = None,
    seed: SeedOption = 0,
    question: Annotated[bool, typer.Option("--question/--no-question", help="With the question in sight.")] = True,
    methods: MethodsOption = "restkv,snapkv,h2o,streamingllm",
    budget: Annotated[int, typer.Option(max=MOST_TOKENS, help="Entries per KV head.")] = 64,
    prefill: PrefillOption = "dense",
    out: Annotated[Path | None, typer.Option(help="Also draw a picture, PNG.")] = None,
    where: LoadOptions = EAGERLY,
) -> None:
    """Show which positions of a prompt each layer and head kept: a needle that survives, or dies."""
    from bench.quality.kept import find_marks, kept_figure, look, terminal
    from bench.quality.tasks import Frame, make_sample
    from bench.report.figures import need_matplotlib, save_png
    from bench.runs.methods import check, equal_bytes, parse_methods
    from bench.runs.together import pattern_of
    from restkv.cli.console import table_console

    if out is not None:
        need_matplotlib()
        if not out.parent.is_dir():
            raise OutputError(f"{out}: there is no folder {out.parent}; make it, or choose another place")
    pattern = pattern_of(prefill)
    lm = where.load(model)
    marks = list(mark or ())
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    else:
        sample = make_sample(task, length, seed, 0, Frame(lm.tokenizer), depth)
        prompt = f"{sample.context} {sample.question} {sample.answer_prefix}" if question else sample.context
        marks = marks or [needle for needle, _ in sample.meta.get("needles", ()) if _asked(needle, sample)]
    ids = lm.encode(prompt)
    policies = []
    for method in parse_methods(methods):
        if not method.full:
            check(lm, method, budget, len(ids), f"a prompt of {len(ids)} tokens")
            policies.append((method.label, equal_bytes(lm, method, budget, lambda: ids, pattern)))
    seen = look(lm, ids, policies, find_marks(lm, prompt, marks), pattern)
    console = table_console()
    for one in seen:
        for line in terminal(one, console.width - 9):
            console.print(line)
        console.print()
    if out is not None:
        save_png(kept_figure(seen), out)
        put_line(out)


def _asked(needle: str, sample: Sample) -> bool:
    return any(answer in needle for answer in sample.answers)

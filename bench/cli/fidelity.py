"""`restkv bench fidelity`: how near to the full cache a compressed one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from restkv.cli.options import MOST_SAMPLES, MOST_TEXT, RECALL, LoadOptions, ModelArgument, read_text
from restkv.errors import PromptError


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
    layer_errors: Annotated[
        bool,
        typer.Option(
            "--layer-errors/--no-layer-errors", help="Also errors of every layer's attention output; takes longer."
        ),
    ] = False,
    oracle: Annotated[
        int, typer.Option(max=MOST_SAMPLES, help="So many of them also against greedy elimination, which is slow.")
    ] = 0,
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
        layer_errors=layer_errors,
        oracle=oracle,
        oracle_context=oracle_context,
        prefill=prefill,
    )
    run_plan(lm, plan, out)

"""`restkv bench ruler` and `needle`: accuracy of retrieval on prompts that restkv makes. docs/benchmarks.md explains them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import (
    EAGERLY,
    RIVALS,
    CompressionOption,
    EvictOption,
    MethodsOption,
    OutOption,
    PrefillOption,
    QuestionOption,
    SeedOption,
    evicts_once,
    parse_compression,
    parse_numbers,
    run_plan,
    split_names,
)
from restkv.cli.groups import spread
from restkv.cli.options import MOST_DEPTHS, MOST_SAMPLES, RECALL, LoadOptions, ModelArgument

if TYPE_CHECKING:
    from bench.runs.methods import Method
    from restkv.lm import LM

LengthsOption = Annotated[str, typer.Option(help="Tokens of prompt and answer together.")]


@dataclass(frozen=True)
class AskOptions:
    """How questions are asked, and when their prompts are evicted."""

    question: QuestionOption = "both"
    evict: EvictOption = "prompt"
    seed: SeedOption = 0
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask through the chat template.", show_default="if there is one"),
    ] = None
    prefill: PrefillOption = "dense"

    def methods(self, text: str) -> tuple[Method, ...]:
        from bench.runs.methods import parse_methods

        return tuple(parse_methods(text, evicts_once(self.evict)))

    def of_plan(self, lm: LM) -> dict[str, Any]:
        """As fields of a plan."""
        chat = lm.tokenizer.has_chat_template if self.chat is None else self.chat
        return {"question": self.question, "seed": self.seed, "chat": chat, "prefill": self.prefill}


@spread
def ruler(
    *,
    model: ModelArgument = str(RECALL),
    tasks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    lengths: LengthsOption = "1024",
    methods: MethodsOption = RIVALS,
    compression: CompressionOption = "8,16,32",
    samples: Annotated[
        int, typer.Option(max=MOST_SAMPLES, help="Per task and length; a rerun with more adds to what is there.")
    ] = 20,
    asking: AskOptions,
    out: OutOption = Path("bench-ruler"),
    where: LoadOptions = EAGERLY,
) -> None:
    """Retrieval: task x length x method x compression, accuracy with 95 % intervals."""
    from bench.quality.ruler import Plan
    from bench.quality.tasks import TASKS

    lm = where.load(model)
    plan = Plan(
        tuple(TASKS) if tasks == "all" else split_names(tasks),
        parse_numbers(lengths, "lengths"),
        asking.methods(methods),
        parse_compression(compression),
        samples,
        **asking.of_plan(lm),
    )
    run_plan(lm, plan, out)


@spread
def needle(
    *,
    model: ModelArgument = str(RECALL),
    lengths: LengthsOption = "256,512,1024",
    depths: Annotated[
        int, typer.Option(max=MOST_DEPTHS, help="Depths of the needle, evenly from beginning to end.")
    ] = 5,
    methods: MethodsOption = RIVALS,
    compression: Annotated[float, typer.Option(help="Length over entries per KV head.")] = 16.0,
    samples: Annotated[
        int, typer.Option(max=MOST_SAMPLES, help="Per depth and length; a rerun with more adds to what is there.")
    ] = 4,
    asking: AskOptions,
    out: OutOption = Path("bench-needle"),
    where: LoadOptions = EAGERLY,
) -> None:
    """One needle at every depth of every length: a heat map for each method."""
    from bench.quality.needle import needle_plan

    lm = where.load(model)
    numbers = parse_numbers(lengths, "lengths")
    plan = needle_plan(numbers, depths, asking.methods(methods), compression, samples, **asking.of_plan(lm))
    run_plan(lm, plan, out)

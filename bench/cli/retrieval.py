"""`restkv bench ruler` and `needle`: accuracy of retrieval on prompts that restkv makes. docs/benchmarks.md explains them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import (
    EAGER,
    RIVALS,
    CompressionOption,
    EvictOption,
    MethodsOption,
    OutOption,
    PrefillOption,
    QuestionOption,
    SeedOption,
    evicts_once,
    load_model,
    parse_compression,
    parse_numbers,
    run_plan,
    split_names,
)
from restkv.cli.options import RECALL, BackendOption, DeviceOption, DtypeOption, ModelArgument

if TYPE_CHECKING:
    from restkv.lm import LM

LengthsOption = Annotated[str, typer.Option(help="Tokens of prompt and answer together.")]
ChatOption = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Ask through the chat template.", show_default="if there is one"),
]


def ruler(
    model: ModelArgument = str(RECALL),
    tasks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    lengths: LengthsOption = "1024",
    methods: MethodsOption = RIVALS,
    compression: CompressionOption = "8,16,32",
    samples: Annotated[int, typer.Option(help="Per task and length; a rerun with more adds to what is there.")] = 20,
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
    from bench.quality.ruler import Plan
    from bench.quality.tasks import TASKS
    from bench.runs.methods import parse_methods

    lm = load_model(model, dtype, device, backend)
    plan = Plan(
        tuple(TASKS) if tasks == "all" else split_names(tasks),
        parse_numbers(lengths, "lengths"),
        tuple(parse_methods(methods, evicts_once(evict))),
        parse_compression(compression),
        samples,
        question=question,
        seed=seed,
        chat=_chat(lm, chat),
        prefill=prefill,
    )
    run_plan(lm, plan, out)


def needle(
    model: ModelArgument = str(RECALL),
    lengths: LengthsOption = "256,512,1024",
    depths: Annotated[int, typer.Option(help="Depths of the needle, evenly from beginning to end.")] = 5,
    methods: MethodsOption = RIVALS,
    compression: Annotated[float, typer.Option(help="Length over entries per KV head.")] = 16.0,
    samples: Annotated[int, typer.Option(help="Per depth and length; a rerun with more adds to what is there.")] = 4,
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
    from bench.quality.needle import needle_plan
    from bench.runs.methods import parse_methods

    lm = load_model(model, dtype, device, backend)
    plan = needle_plan(
        parse_numbers(lengths, "lengths"),
        depths,
        parse_methods(methods, evicts_once(evict)),
        compression,
        samples,
        question=question,
        seed=seed,
        chat=_chat(lm, chat),
        prefill=prefill,
    )
    run_plan(lm, plan, out)


def _chat(lm: LM, chat: bool | None) -> bool:
    return lm.tokenizer.has_chat_template if chat is None else chat

"""`restkv bench documents`: documents compressed once and asked many questions, or each with its question in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import (
    EAGERLY,
    CompressionOption,
    EvictOption,
    MethodsOption,
    ModelChoice,
    OutOption,
    QuestionOption,
    evicts_once,
    parse_compression,
    run_plan,
)
from restkv.cli.groups import spread
from restkv.cli.options import MOST_SAMPLES, MOST_TEXT, LoadOptions


@spread
def documents(
    *,
    data: Annotated[
        Path, typer.Option("--data", help="JSON lines with input, instructions and outputs, as L-Eval's files have.")
    ],
    chosen: ModelChoice,
    methods: MethodsOption = "restkv,snapkv,expected-attention,keydiff,streamingllm",
    compression: CompressionOption = "4,8,16",
    question: QuestionOption = "agnostic",
    answer: Annotated[
        str, typer.Option(help="gold: the file's answers; own: what the full cache itself says, greedily.")
    ] = "gold",
    answer_tokens: Annotated[
        int | None, typer.Option(max=MOST_TEXT, help="Of an answer, at most.", show_default="48 of gold, 24 of own")
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="answer: how likely answers are; letters: also which letter is the likeliest; auto: letters, where all "
            "answers are."
        ),
    ] = "auto",
    limit: Annotated[int | None, typer.Option(max=MOST_SAMPLES, help="Documents.", show_default="all")] = None,
    questions: Annotated[
        int | None, typer.Option(max=MOST_SAMPLES, help="Of each document, the first.", show_default="all")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            max=MOST_TEXT,
            help="Documents whose longest prompt and answer have more are left out.",
            show_default="the model's positions",
        ),
    ] = None,
    evict: EvictOption = "prompt",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask through the chat template.", show_default="if there is one"),
    ] = None,
    out: OutOption = Path("bench-documents"),
    where: LoadOptions = EAGERLY,
) -> None:
    """Documents with many questions: KL to the full cache and likelihood of the answers, with 95 % intervals."""
    from bench.quality.documents import DocumentsPlan
    from bench.runs.methods import parse_methods

    policies, rates = tuple(parse_methods(methods, evicts_once(evict))), parse_compression(compression)
    lm = where.load(chosen.path)
    plan = DocumentsPlan(
        data,
        policies,
        rates,
        question=question,
        answer=answer,
        answer_tokens=answer_tokens,
        score=score,
        limit=limit,
        questions=questions,
        max_tokens=max_tokens,
        chat=lm.tokenizer.has_chat_template if chat is None else chat,
    )
    run_plan(lm, plan, out)

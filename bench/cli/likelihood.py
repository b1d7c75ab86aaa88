"""`restkv bench anli`, `perplexity` and `smoothing`: what eviction costs where nothing is generated.

docs/perplexity-and-anli.md explains them. torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import (
    EAGERLY,
    METHODS_FORM,
    CompressionOption,
    MethodsOption,
    ModelChoice,
    OutOption,
    QuestionOption,
    SeedOption,
    parse_budgets,
    parse_compression,
    parse_numbers,
    run_plan,
    split_names,
)
from restkv.cli.groups import spread
from restkv.cli.options import MOST_SAMPLES, MOST_TEXT, RECALL, LoadOptions, ModelArgument
from restkv.errors import PromptError

LIKELY = "restkv,snapkv,h2o,tova,streamingllm"

AnliOption = Annotated[Path, typer.Option("--data", help="The folder anli_v1.0 of the published archive.")]
ShotsOption = Annotated[
    int, typer.Option(max=MOST_SAMPLES, help="Worked examples before each premise, from the round's train.jsonl.")
]


@spread
def anli(
    *,
    data: AnliOption,
    chosen: ModelChoice,
    methods: MethodsOption = LIKELY,
    budgets: Annotated[
        str, typer.Option(help="Shares of the prompt (at least 8 entries), or entries per KV head.")
    ] = "0.1,0.2,0.3,0.4,0.5",
    rounds: Annotated[str, typer.Option(help="Of 1, 2 and 3.")] = "1,2,3",
    split: Annotated[str, typer.Option(help="test, dev or train.")] = "test",
    shots: ShotsOption = 0,
    limit: Annotated[int | None, typer.Option(max=MOST_SAMPLES, help="Samples per round.", show_default="all")] = None,
    fraction: Annotated[float, typer.Option(help="Of each round's samples, spread evenly over them.")] = 1.0,
    question: QuestionOption = "both",
    seed: SeedOption = 0,
    out: OutOption = Path("bench-anli"),
    where: LoadOptions = EAGERLY,
) -> None:
    """ANLI on evicted premises: True, Neither or False, by likelihood; accuracy per round with 95 % intervals."""
    from bench.quality.anli import AnliPlan
    from bench.runs.methods import parse_methods

    plan = AnliPlan(
        data,
        tuple(parse_methods(methods)),
        parse_budgets(budgets),
        rounds=parse_numbers(rounds, "rounds"),
        split=split,
        shots=shots,
        limit=limit,
        question=question,
        seed=seed,
        fraction=fraction,
    )
    run_plan(where.load(chosen.path), plan, out)


@spread
def perplexity(
    *,
    chosen: ModelChoice,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A .txt or .jsonl (rows with page or text), or a folder of them.", show_default="generated prose"
        ),
    ] = None,
    protocol: Annotated[str, typer.Option(help="streaming, prefill or chunked.")] = "prefill",
    methods: MethodsOption = f"{LIKELY},lacache",
    budgets: Annotated[
        str, typer.Option(help="Entries per KV head, or shares of the context (prefill) or of the tokens.")
    ] = "0.5,0.25,0.125",
    tokens: Annotated[int, typer.Option(max=MOST_TEXT, help="Scored per window of the text.")] = 128,
    context: Annotated[int, typer.Option(max=MOST_TEXT, help="Prefilled before them (prefill).")] = 256,
    chunk: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens between two evictions (chunked).")] = 64,
    windows: Annotated[int, typer.Option(max=MOST_SAMPLES, help="Of the text, at most; they share no token.")] = 16,
    out: OutOption = Path("bench-perplexity"),
    where: LoadOptions = EAGERLY,
) -> None:
    """Perplexity of texts per token, word and byte, on evicted caches, with 95 % intervals."""
    from bench.quality.corpus import prose, read_documents
    from bench.quality.perplexity import PerplexityPlan, Protocol
    from bench.runs.methods import parse_methods

    how = Protocol(protocol, tokens, context if protocol == "prefill" else 0, chunk if protocol == "chunked" else 0)
    documents = None if data is None else tuple(read_documents(data))
    lm = where.load(chosen.path)
    if documents is None:
        documents = (prose(lm.tokenizer, windows * (how.context + how.tokens), seed=0),)
    plan = PerplexityPlan(
        documents, tuple(parse_methods(methods)), parse_budgets(budgets), protocol=how, windows=windows
    )
    run_plan(lm, plan, out)


@spread
def smoothing(
    *,
    model: ModelArgument = str(RECALL),
    text: Annotated[
        Path | None, typer.Option(help="For perplexity; as --data of `perplexity`.", show_default="generated prose")
    ] = None,
    anli_data: Annotated[
        Path | None,
        typer.Option("--anli", help="Classify ANLI, from this folder.", show_default="questions about generated prose"),
    ] = None,
    shots: ShotsOption = 16,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar=METHODS_FORM,
            help="Instead of ReST-KV, ReST-KV without its parts, and its rivals.",
            show_default="see the docs",
        ),
    ] = None,
    probes: Annotated[
        str,
        typer.Option(
            metavar="PROBE,...",
            help="Whose queries the methods observe that choose: each of window, draft:N, replay, ... (docs/probes.md).",
        ),
    ] = "window",
    compression: CompressionOption = "2,4,8,16,32,64",
    length: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens of a context.")] = 1024,
    tail: Annotated[int, typer.Option(max=MOST_TEXT, help="Tokens scored after the context of a text.")] = 128,
    windows: Annotated[int, typer.Option(max=MOST_SAMPLES, help="Of the text, at most.")] = 48,
    samples: Annotated[
        int, typer.Option(max=MOST_SAMPLES, help="Questions of each task, or ANLI samples per round.")
    ] = 100,
    question: QuestionOption = "both",
    seed: SeedOption = 0,
    out: OutOption = Path("bench-smoothing"),
    where: LoadOptions = EAGERLY,
) -> None:
    """Does smoothing pay? ReST-KV against itself without its parts, and against its rivals, at compressions up to 64x."""
    from bench.quality.corpus import read_documents
    from bench.quality.smoothing import SmoothingPlan, arms

    if anli_data is None and shots != 16:
        raise PromptError(f"--shots {shots}: only ANLI has worked examples; give --anli too")
    plan = SmoothingPlan(
        arms(methods, split_names(probes) or ("window",)),
        parse_compression(compression),
        documents=None if text is None else tuple(read_documents(text)),
        length=length,
        tail=tail,
        windows=windows,
        anli=anli_data,
        shots=shots,
        samples=samples,
        question=question,
        seed=seed,
    )
    run_plan(where.load(model), plan, out)

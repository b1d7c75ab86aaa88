"""`restkv demo`: one long text, one question, and several caches that answer it side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.cli.options import EAGERLY, METHODS_FORM, PrefillOption
from modeling.shown import shown
from restkv.cli.console import table_console
from restkv.cli.groups import spread
from restkv.cli.options import MOST_TEXT, RECALL, LoadOptions, ModelArgument

if TYPE_CHECKING:
    from bench.quality.tasks import Frame, Sample
    from bench.runs.methods import Method
    from restkv.lm import LM
    from restkv.patterns import Pattern
    from restkv.results import Generation, Stats
    from restkv.session import Session

NARROWEST = 14  # characters of a column in which an answer can still be read


@dataclass
class Contender:
    """One method's cache and what it has answered so far."""

    label: str
    session: Session
    stats: Stats
    text: str = ""
    results: list[Generation] = field(default_factory=list)


@spread
def demo(
    *,
    model: ModelArgument = str(RECALL),
    context: Annotated[
        int, typer.Option(max=MOST_TEXT, min=256, help="Tokens of text, question and answer together.")
    ] = 4096,
    compression: Annotated[float, typer.Option(min=1, help="Context over entries kept per KV head.")] = 32.0,
    methods: Annotated[
        str,
        typer.Option(metavar=METHODS_FORM, help="Methods; the full cache is always there too."),
    ] = "restkv,snapkv,h2o,streamingllm",
    task: Annotated[str, typer.Option(help="A task of `restkv bench ruler`.")] = "niah_multiquery",
    seed: Annotated[int, typer.Option(help="Of the text and its needles.")] = 0,
    prefill: PrefillOption = "dense",
    where: LoadOptions = EAGERLY,
) -> None:
    """Hide codes in a long text, compress its cache in several ways, and watch who still knows them."""
    from bench.quality.tasks import Frame, make_sample
    from bench.runs.methods import check, parse_methods
    from bench.runs.together import pattern_of

    pattern = pattern_of(prefill)
    lm = where.load(model)
    frame = Frame(lm.tokenizer, lm.tokenizer.has_chat_template)
    sample = make_sample(task, context, seed, 0, frame)
    # What comes after the prompt is kept by all, or bytes would not be equal.
    chosen = parse_methods(methods, once=True)
    entries = max(1, round(context / compression))
    for method in chosen:
        check(lm, method, entries, context, f"{context} tokens at {compression:g}x")

    terminal, console = sys.stdout.isatty(), table_console()
    _introduce(console, sample, frame)
    contenders = _prefill(lm, frame, sample, chosen, entries, pattern)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in _race(lm, contenders, sample.max_new_tokens):
            if terminal:
                live.update(_answers(console, contenders, sample), refresh=True)
    console.print(_answers(console, contenders, sample), _verdict(contenders, sample), sep="")


def _introduce(console: Console, sample: Sample, frame: Frame) -> None:
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    console.print(f"{len(context) + len(asked):,} tokens of text, and somewhere in it:", style="bold")
    for needle, depth in sorted(sample.meta.get("needles", ()), key=lambda needle: needle[1]):
        console.print(f"  {depth:4.0%}  {needle}")
    console.print(Text.assemble(f"{sample.question} ", (sample.answer_prefix, "dim"), "\n"), style="bold")


def _prefill(
    lm: LM, frame: Frame, sample: Sample, methods: Sequence[Method], entries: int, pattern: Pattern | None
) -> list[Contender]:
    """One pass over the prompt fills every cache; each method keeps as many bytes as any other."""
    from bench.runs.methods import equal_bytes
    from bench.runs.together import prefill_together
    from restkv.results import Stats
    from restkv.session import Session

    prompt = [token for part in frame.ids(sample.context, sample.question, sample.answer_prefix) for token in part]
    policies = [equal_bytes(lm, method, entries, lambda: prompt, pattern) for method in methods]
    sessions = [Session(lm.engine, policy, [len(prompt)], sample.max_new_tokens) for policy in policies]
    prefill_together(lm, sessions, prompt, pattern)
    return [
        Contender(method.label, session, Stats(policy.name, policy.budget, [len(prompt)]))
        for method, policy, session in zip(methods, policies, sessions, strict=True)
    ]


def _race(lm: LM, contenders: Sequence[Contender], room: int) -> Iterator[None]:
    """A piece of text from each in turn, until all have ended. Steps are timed one by one, so turns cost nobody time."""
    from bench.quality.ruler import FULL_STOP
    from restkv.meter import Meter
    from restkv.results import Decoding

    decoding = Decoding(room, stop=FULL_STOP)
    running = [(one, lm.decode(one.session, decoding, one.stats, Meter(lm.device), one.results)) for one in contenders]
    while running:
        for one, pieces in list(running):
            piece = next(pieces, None)
            if piece is None:
                running.remove((one, pieces))
            else:
                one.text += piece[1]
        yield


def _answers(console: Console, contenders: Sequence[Contender], sample: Sample) -> Table:
    """The answers so far, side by side, or below each other where there is no room for that."""
    texts = [_marked(one.text, sample) for one in contenders]
    wide = console.width // len(contenders) >= NARROWEST + 3
    table = Table(expand=True, show_header=wide)
    if wide:
        for one in contenders:
            table.add_column(one.label, ratio=1, overflow="fold")
        table.add_row(*texts)
    else:
        for one, text in zip(contenders, texts, strict=True):
            table.add_row(one.label, text)
    return table


def _marked(text: str, sample: Sample) -> Text:
    """Right answers stand out, and so do numbers that are none."""
    shown_text = Text(shown(text.strip()))
    shown_text.highlight_regex(r"\d+", "red")
    right = "|".join(map(re.escape, sample.answers))
    shown_text.highlight_regex(rf"(?i)(?<![^\W_])(?:{right})(?![^\W_])", "bold green")
    return shown_text


def _verdict(contenders: Sequence[Contender], sample: Sample) -> Table:
    from bench.quality.tasks import score
    from bench.runs.together import kept_mean
    from restkv.cli.display import byte_text

    table = Table("method", "right", "kept of seen", "cache", "ms per token", expand=True)
    for one in contenders:
        share = score(one.text, sample.answers)
        right = f"{round(share * len(sample.answers))} of {len(sample.answers)}"
        table.add_row(
            one.label,
            Text(right, "bold green" if share == 1 else "red"),
            f"{kept_mean(one.session):,.0f} of {one.stats.seen[0]:,}",
            byte_text(one.stats.live_bytes),
            f"{1000 * one.stats.tpot_s:.1f}",
        )
    return table

"""`restkv bench kept` and `mask`: what is in a cache after a prompt, by position of the text and by page of the pool.

They are `restkv inspect --kept` and `--mask`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bench.cli.options import EAGERLY, MethodsOption, PrefillOption, SeedOption
from restkv.cli.groups import spread
from restkv.cli.options import MOST_TEXT, MOST_TOKENS, RECALL, LoadOptions, ModelArgument, read_text
from restkv.cli.terminal import json_text, put_line
from restkv.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.quality.tasks import Sample
    from restkv.lm import LM
    from restkv.patterns import Pattern
    from restkv.policies import Policy

Shown = TypeVar("Shown")
PictureOption = Annotated[Path | None, typer.Option(help="Also draw a picture, PNG.")]


@dataclass(frozen=True)
class PromptOptions:
    """A prompt, and the methods under which it is read."""

    prompt_file: Annotated[Path | None, typer.Option(help="The prompt; without one, a sample of --task.")] = None
    task: Annotated[str, typer.Option(help="A task of `restkv bench ruler`.")] = "niah_single"
    length: Annotated[int, typer.Option("--length", "--context", max=MOST_TEXT, help="Its tokens.")] = 512
    depth: Annotated[float | None, typer.Option(help="Where its needle is, from 0 to 1.")] = None
    seed: SeedOption = 0
    question: Annotated[bool, typer.Option("--question/--no-question", help="With the question in sight.")] = True
    methods: MethodsOption = "restkv,snapkv,h2o,streamingllm"
    budget: Annotated[int, typer.Option(max=MOST_TOKENS, help="Entries per KV head.")] = 64
    prefill: PrefillOption = "dense"

    @property
    def pattern(self) -> Pattern | None:
        """Which part of the prompt's attention to compute (bench.runs.together.pattern_of)."""
        from bench.runs.together import pattern_of

        return pattern_of(self.prefill)

    def read(self, lm: LM) -> tuple[str, list[str]]:
        """The prompt, and the needles in it that its question asks for."""
        if self.prompt_file is not None:
            return read_text(self.prompt_file), []
        from bench.quality.tasks import Frame, make_sample

        sample = make_sample(self.task, self.length, self.seed, 0, Frame(lm.tokenizer), self.depth)
        prompt = f"{sample.context} {sample.question} {sample.answer_prefix}" if self.question else sample.context
        return prompt, [needle for needle, _ in sample.meta.get("needles", ()) if _asked(needle, sample)]

    def policies(self, lm: LM, ids: Sequence[int]) -> list[tuple[str, Policy]]:
        """Labels and policies of equal bytes, without the full cache."""
        from bench.runs.methods import check, equal_bytes, parse_methods

        policies = []
        for method in parse_methods(self.methods):
            if not method.full:
                check(lm, method, self.budget, len(ids), f"a prompt of {len(ids)} tokens")
                policies.append((method.label, equal_bytes(lm, method, self.budget, lambda: ids, self.pattern)))
        return policies


@spread
def kept(
    *,
    model: ModelArgument = str(RECALL),
    mark: Annotated[list[str] | None, typer.Option(help="Point out this part of the prompt; may be repeated.")] = None,
    text: PromptOptions,
    out: PictureOption = None,
    where: LoadOptions = EAGERLY,
) -> None:
    """Show which positions of a prompt each layer and head kept: a needle that survives, or dies."""
    from bench.quality.kept import find_marks, kept_figure, look, terminal
    from restkv.cli.console import table_console

    _check_picture(out)
    pattern = text.pattern
    lm = where.load(model)
    prompt, needles = text.read(lm)
    ids = lm.encode(prompt)
    policies = text.policies(lm, ids)
    seen = look(lm, ids, policies, find_marks(lm, prompt, mark or needles), pattern)
    console = table_console()
    for one in seen:
        for line in terminal(one, console.width - 9):
            console.print(line)
        console.print()
    _draw(kept_figure, seen, out)


@spread
def mask(
    *,
    model: ModelArgument = str(RECALL),
    text: PromptOptions,
    tokens: Annotated[
        int, typer.Option(min=0, max=MOST_TEXT, help="Tokens decoded after the prompt, the likeliest.")
    ] = 24,
    json_output: Annotated[bool, typer.Option("--json", help="Print all pages and counts as one JSON object.")] = False,
    out: PictureOption = None,
    where: LoadOptions = EAGERLY,
) -> None:
    """Show the mask that decoding attends through: the pages each head holds and reads, and what of them is dead."""
    from bench.quality.mask import LEGEND, mask_figure, masks, terminal
    from restkv.cli.console import table_console

    _check_picture(out)
    pattern = text.pattern
    lm = where.load(model)
    ids = lm.encode(text.read(lm)[0])
    found = masks(lm, ids, text.policies(lm, ids), tokens, pattern)
    if json_output:
        put_line(json_text({"model": model, "masks": [one.as_json() for one in found]}))
    else:
        console = table_console()
        for one in found:
            for line in terminal(one, console.width):
                console.print(line)
            console.print()
        console.print(LEGEND, style="dim")
    _draw(mask_figure, found, out, named=not json_output)


def _asked(needle: str, sample: Sample) -> bool:
    return any(answer in needle for answer in sample.answers)


def _check_picture(out: Path | None) -> None:
    """Whether a picture could be drawn, before anything is computed for it.

    Raises:
        OutputError: no matplotlib, or no such folder.
    """
    if out is None:
        return
    from bench.report.figures import need_matplotlib

    need_matplotlib()
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}; make it, or choose another place")


def _draw(
    figure: Callable[[Sequence[Shown]], Figure], shown: Sequence[Shown], out: Path | None, named: bool = True
) -> None:
    """Save a picture where one is wanted; named: print its name."""
    if out is not None:
        from bench.report.figures import save_png

        save_png(figure(shown), out)
        if named:
            put_line(out)

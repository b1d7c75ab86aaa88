"""`restkv generate`: text in, text out as it is made, a summary on stderr."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from restkv.cli import ranks
from restkv.cli.groups import spread
from restkv.cli.options import (
    MOST_TOKENS,
    RECALL,
    AnswerMethodOption,
    BudgetOption,
    LoadOptions,
    ModelArgument,
    PrefillOption,
    PresetOption,
    SamplingOptions,
    SetOption,
    TemplateArgOption,
    TemplateNameOption,
    given_text,
    keep_option,
    make_policy,
    model_option,
    note_escapes,
    parse_interval,
    parse_span,
    parse_template_args,
    read_text,
    text_option,
    with_fields,
)
from restkv.cli.sink import Sink
from restkv.cli.terminal import json_text, say, status
from restkv.errors import PromptError

if TYPE_CHECKING:
    from restkv.lm import LM

PROMPT_HELP = (
    "The prompt as it stands: \\n in it is no line break. For line breaks give $'one\\ntwo' (in bash), --prompt-file, or "
    "stdin."
)


@dataclass(frozen=True)
class KeepOptions:
    """The method's options that have a flag of their own."""

    budget: BudgetOption = None
    budget_by: Annotated[
        str | None,
        keep_option(help="How layers and heads share the budget: uniform, pyramid, adakv, global (restkv's default)."),
    ] = None
    probe: Annotated[
        str | None,
        keep_option(
            help="Whose queries the prompt's eviction observes: window; prompt[:N] (N of its own, no further pass); draft:N (N "
            "steps, with the full cache alive); replay (the prompt is read twice); questions[:N][:FILE] (some 200 tokens more; "
            "with N tokens of each answer also N steps and the full cache alive); ask[:N] (N questions of the model's own, some "
            "60 steps with the full cache alive); some joined by +. `restkv inspect` has the numbers.",
            show_default="the preset's, or window",
        ),
    ] = None
    refit: Annotated[
        str | None,
        keep_option(
            help="Fit what is kept of the prompt to the probe's queries, so that it stands for all: values, bias, both, none.",
            show_default="none, or the preset's",
        ),
    ] = None
    window: Annotated[
        int | None,
        keep_option(max=MOST_TOKENS, help="Newest entries always kept; their queries are the ones observed."),
    ] = None
    sinks: Annotated[int | None, keep_option(max=MOST_TOKENS, help="First entries always kept.")] = None
    protect: Annotated[
        list[str] | None,
        keep_option(metavar="START:END", help="Positions START to END - 1 are always kept. May be repeated."),
    ] = None
    interval: Annotated[
        str | None, keep_option(metavar="N|none", help="New tokens between evictions; none: never again.")
    ] = None
    granularity: Annotated[str | None, keep_option(help="One kept set per kv head, or per query head.")] = None
    gqa: Annotated[str | None, keep_option(help="How query heads that share a KV head agree: mean, max or joint.")] = (
        None
    )
    alpha: Annotated[
        float | None,
        keep_option(help="restkv: weight of the newest query in its average.", show_default="all weigh the same"),
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that are given, as a policy takes them."""
        options = {name: value for name, value in vars(self).items() if value is not None}
        if self.protect is not None:
            options["protect"] = tuple(map(parse_span, self.protect))
        if self.interval is not None:
            options["interval"] = parse_interval(self.interval)
        return options


@spread
def generate(
    *,
    model: ModelArgument = str(RECALL),
    prompt: Annotated[str | None, text_option("--prompt", "-p", help=PROMPT_HELP)] = None,
    prompt_file: Annotated[
        Path | None, text_option(help="Read the prompt from a file, less its last line break.")
    ] = None,
    chat: Annotated[
        bool | None,
        text_option(help="Wrap the prompt in the checkpoint's chat template.", show_default="if there is one"),
    ] = None,
    template_name: TemplateNameOption = None,
    template_arg: TemplateArgOption = None,
    json_output: Annotated[
        bool, text_option("--json", help="Print text, tokens and stats as one JSON object.")
    ] = False,
    output: Annotated[Path | None, text_option("--output", "-o", help="Write to a file, not to stdout.")] = None,
    method: AnswerMethodOption = None,
    preset: PresetOption = None,
    keep: KeepOptions,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
    chunk: Annotated[int | None, keep_option(max=MOST_TOKENS, help="Tokens per chunk of a chunked prefill.")] = None,
    sampling: SamplingOptions,
    where: LoadOptions,
    check_weights: Annotated[
        bool, model_option("--check-weights", help="Refuse weights that hold NaN or infinity.")
    ] = False,
    parallel: Annotated[
        str,
        model_option(
            help="tensor: torchrun's processes share the model by KV head. auto: tensor under torchrun, else none."
        ),
    ] = "auto",
) -> None:
    """Continue a prompt while keeping only part of its KV cache."""
    if chunk is not None and prefill != "chunked":
        raise PromptError(f"--chunk {chunk}: only --prefill chunked reads in chunks; give it too, or drop --chunk")
    rank, size = ranks.place()
    parallel = _parallel(parallel, size)
    text = _read_prompt(prompt, prompt_file) if rank == 0 else ""
    template_args = parse_template_args(template_arg)
    decoding = sampling.decoding()
    policy = make_policy(method, preset, with_fields(keep.given(), field), prefill)
    sink = Sink(output if rank == 0 else None)

    from restkv.cli.display import summary
    from restkv.kernels import announce_compiling
    from restkv.saving.store import policy_to_dict

    lm = where.load(model, check_weights, parallel)
    text = lm.ranks.share(text)
    announce_compiling(lm.compiled)
    stream = lm.stream(
        _encode(lm, model, text, chat, template_name, template_args),
        policy,
        prefill=prefill,
        progress=status.progress("reading the prompt"),
        **({} if chunk is None else {"chunk": chunk}),
        **decoding,
    )
    for piece in stream:
        if not json_output:
            sink.write(piece)
    generation = stream.generation
    if json_output:
        sink.write(json_text({"model": model, "policy": policy_to_dict(policy), **asdict(generation)}))
    sink.write("\n")
    sink.close()
    say(summary(generation))


def _parallel(asked: str, size: int) -> str:
    """What --parallel says, where torchrun has started so many processes."""
    if asked == "auto":
        return "tensor" if size > 1 else "none"
    if asked not in ("tensor", "none"):
        raise PromptError(f"--parallel {asked}: give auto, tensor or none")
    if asked == "none" and size > 1:
        raise PromptError(f"--parallel none: {size} processes would all do the same; start one, without torchrun")
    return asked


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise PromptError("two prompts: give --prompt or --prompt-file, not both")
    if prompt is not None:
        note_escapes("--prompt", prompt, ", --prompt-file, or stdin")
        return given_text(prompt)
    if file is None and sys.stdin.isatty():
        raise PromptError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on stdin")
    return read_text(file).removesuffix("\n")


def _encode(
    lm: LM, model: str, text: str, chat: bool | None, template_name: str | None, template_args: dict[str, Any]
) -> str | list[int]:
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    if chat is None:
        chat = lm.tokenizer.has_chat_template
    elif chat and not lm.tokenizer.has_chat_template:
        raise PromptError(f"{model}: has no chat template; drop --chat")
    if not chat and (template_name or template_args):
        option = f"--template-name {template_name}" if template_name else f"--template-arg {next(iter(template_args))}"
        raise PromptError(f"{option}: no chat template is used here; drop it")
    if not chat:
        return text
    if template_args:
        lm.tokenizer.check_template(template_args, template_name)
    turn = [{"role": "user", "content": text}]
    return lm.tokenizer.chat(turn, template_args=template_args, template_name=template_name)

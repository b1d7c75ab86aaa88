"""`restkv generate`: text in, text out as it is made, a summary on stderr."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restkv.cli.options import (
    KEEP,
    MODEL,
    OUTPUT,
    PROMPT_HELP,
    RECALL,
    BackendOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    MethodOption,
    MinPOption,
    ModelArgument,
    PrefillOption,
    PresetOption,
    SeedOption,
    SetOption,
    StopOption,
    TemperatureOption,
    TemplateArgOption,
    TemplateNameOption,
    TopKOption,
    TopPOption,
    given_text,
    make_policy,
    note_escapes,
    parse_interval,
    parse_span,
    parse_template_args,
    read_text,
    with_fields,
)
from restkv.cli.sink import Sink
from restkv.cli.terminal import json_text, say, status
from restkv.errors import PromptError

if TYPE_CHECKING:
    from restkv.lm import LM


def generate(
    model: ModelArgument = str(RECALL),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", rich_help_panel=OUTPUT, help=PROMPT_HELP)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, help="Read the prompt from a file, less its last line break."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=OUTPUT,
            help="Wrap the prompt in the checkpoint's chat template.",
            show_default="if there is one",
        ),
    ] = None,
    template_name: TemplateNameOption = None,
    template_arg: TemplateArgOption = None,
    json_output: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print text, tokens and stats as one JSON object.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="Write to a file, not to stdout.")
    ] = None,
    method: MethodOption = "restkv",
    preset: PresetOption = None,
    budget: BudgetOption = None,
    budget_by: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=KEEP,
            help="How layers and heads share the budget: uniform, pyramid, adakv, global (restkv's default).",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(rich_help_panel=KEEP, help="Newest entries always kept; their queries are the ones observed."),
    ] = None,
    sinks: Annotated[int | None, typer.Option(rich_help_panel=KEEP, help="First entries always kept.")] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="START:END",
            rich_help_panel=KEEP,
            help="Positions START to END - 1 are always kept. May be repeated.",
        ),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(metavar="N|none", rich_help_panel=KEEP, help="New tokens between evictions; none: never again."),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(rich_help_panel=KEEP, help="One kept set per kv head, or per query head.")
    ] = None,
    gqa: Annotated[
        str | None,
        typer.Option(rich_help_panel=KEEP, help="How query heads that share a KV head agree: mean, max or joint."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=KEEP,
            help="restkv: weight of the newest query in its average.",
            show_default="all weigh the same",
        ),
    ] = None,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
    chunk: Annotated[
        int | None, typer.Option(rich_help_panel=KEEP, help="Tokens per chunk of a chunked prefill.")
    ] = None,
    max_new_tokens: LengthOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    check_weights: Annotated[
        bool, typer.Option("--check-weights", rich_help_panel=MODEL, help="Refuse weights that hold NaN or infinity.")
    ] = False,
) -> None:
    """Continue a prompt while keeping only part of its KV cache."""
    if chunk is not None and prefill != "chunked":
        raise PromptError(f"--chunk {chunk}: only --prefill chunked reads in chunks; give it too, or drop --chunk")
    text = _read_prompt(prompt, prompt_file)
    template_args = parse_template_args(template_arg)
    for one in stop or ():
        note_escapes("--stop", one)
    given = {
        "budget": budget,
        "budget_by": budget_by,
        "window": window,
        "sinks": sinks,
        "granularity": granularity,
        "gqa": gqa,
        "alpha": alpha,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if protect:
        options["protect"] = tuple(map(parse_span, protect))
    if interval is not None:
        options["interval"] = parse_interval(interval)
    policy = make_policy(method, preset, with_fields(options, field))
    sink = Sink(output)

    from restkv.cli.display import byte_text, summary
    from restkv.kernels import announce_compiling
    from restkv.lm import load
    from restkv.saving.store import policy_to_dict

    lm = load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        check_weights=check_weights,
        progress=status.progress("loading the weights", byte_text),
    )
    announce_compiling(lm.compiled)
    stream = lm.stream(
        _encode(lm, model, text, chat, template_name, template_args),
        policy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
        prefill=prefill,
        progress=status.progress("reading the prompt"),
        **({} if chunk is None else {"chunk": chunk}),
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


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise PromptError("two prompts: give --prompt or --prompt-file, not both")
    if prompt is not None:
        note_escapes("--prompt", prompt, ", --prompt-file, or stdin")
        return given_text(prompt, "--prompt")
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

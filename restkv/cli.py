"""The `restkv` command: text in, text out as it is made, a summary on stderr.

torch is imported inside the commands, so that --help answers at once. A user's error is one line on stderr, exit 2.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modeling.errors import RestKVError, RestKVWarning
from restkv import __version__
from restkv.commands import add_commands
from restkv.errors import PolicyError, PromptError
from restkv.files import described
from restkv.options import (
    KEEP,
    MODEL,
    OUTPUT,
    RECALL,
    SPINS,
    BackendOption,
    BudgetOption,
    CompileOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    LoadedMethodOption,
    MethodOption,
    MinPOption,
    ModelArgument,
    PrefillOption,
    PresetOption,
    SeedOption,
    SetOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    make_policy,
    parse_field,
    parse_interval,
    parse_span,
    reading,
    sizing_policy,
    with_fields,
)
from restkv.plugins import entry_points
from restkv.sink import Sink

if TYPE_CHECKING:
    from restkv.lm import LM
    from restkv.policies import Policy


app = typer.Typer(
    name="restkv",
    help="Long prompts, small KV caches: generate text while keeping only the entries that matter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv when None) and return its exit code.

    0: done. 2: a user's error, said in one line on stderr. 130: Ctrl-C. 141: whoever read stdout has gone.
    """
    _open_closed_streams()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch starts its threads
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["inspect"] and "--kept" in arguments:  # only the other command knows what may follow
        arguments = ["bench", "kept", *(word for word in arguments[1:] if word != "--kept")]
    with warnings.catch_warnings():
        warnings.simplefilter("always", RestKVWarning)
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            command = _command()
            with command.make_context("restkv", arguments) as context:
                command.invoke(context)
            sys.stdout.flush()
        except typer.Exit as exit:
            return exit.exit_code
        except (RestKVError, typer.TyperException) as error:
            text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            return _fail(text)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            _silence_stdout()
            return 141
        except OSError as error:  # a full disk under stdout, a checkpoint that vanishes
            text = described(error)
            _silence_stdout()
            return _fail(text)
    return 0


def _open_closed_streams() -> None:
    """A standard stream that was closed, as with `<&-`, is None: read nothing from it, and write to it in vain."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


@cache
def _command() -> Any:
    """The commands of this file, and those that installed packages register."""
    add_commands(app, entry_points(group="restkv.commands"))
    return typer.main.get_command(app)


def _fail(text: str) -> int:
    print("restkv: error:", " ".join(text.split()), file=sys.stderr)
    return 2


def _silence_stdout() -> None:
    """Give the interpreter somewhere to flush stdout to on its way out, when it may fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    if issubclass(category, RestKVWarning):
        print("restkv: note:", " ".join(str(message).split()), file=sys.stderr)
    else:
        otherwise(message, category, *place)


def _version(asked: bool) -> None:
    if asked:
        print("restkv", __version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        context.get_help()  # typer prints it itself
        raise typer.Exit


# -- restkv generate


@app.command()
def generate(
    model: ModelArgument = str(RECALL),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", rich_help_panel=OUTPUT, help="The prompt.")] = None,
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
    compile: CompileOption = None,
    check_weights: Annotated[
        bool, typer.Option("--check-weights", rich_help_panel=MODEL, help="Refuse weights that hold NaN or infinity.")
    ] = False,
) -> None:
    """Continue a prompt while keeping only part of its KV cache."""
    if chunk is not None and prefill != "chunked":
        raise PromptError(f"--chunk {chunk}: only --prefill chunked reads in chunks; give it too, or drop --chunk")
    text = _read_prompt(prompt, prompt_file)
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

    from restkv.display import prefill_bar, summary
    from restkv.lm import load
    from restkv.store import policy_to_dict

    lm = load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        compile="auto" if compile is None else compile,
        check_weights=check_weights,
    )
    with prefill_bar() as progress:
        stream = lm.stream(
            _encode(lm, model, text, chat),
            policy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop or (),
            prefill=prefill,
            progress=progress,
            **({} if chunk is None else {"chunk": chunk}),
        )
        for piece in stream:
            if not json_output:
                sink.write(piece)
    generation = stream.generation
    if json_output:
        shown = {"model": model, "policy": policy_to_dict(policy), **asdict(generation)}
        sink.write(json.dumps(shown, ensure_ascii=False))
    sink.write("\n")
    sink.close()
    print(summary(generation), file=sys.stderr)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise PromptError("two prompts: give --prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise PromptError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on stdin")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # some locales let bytes pass that are no text
    with reading("stdin" if file is None else file):
        # -sig: a byte-order mark is no text.
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
    return text.removesuffix("\n").removesuffix("\r")


def _encode(lm: LM, model: str, text: str, chat: bool | None) -> str | list[int]:
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    if chat is None:
        chat = lm.tokenizer.has_chat_template
    elif chat and not lm.tokenizer.has_chat_template:
        raise PromptError(f"{model}: has no chat template; drop --chat")
    return lm.tokenizer.chat([{"role": "user", "content": text}]) if chat else text


# -- restkv chat


@app.command()
def chat(
    model: ModelArgument = str(RECALL),
    system: Annotated[str | None, typer.Option(rich_help_panel=OUTPUT, help="Instructions; never evicted.")] = None,
    load_file: Annotated[
        Path | None,
        typer.Option("--load", rich_help_panel=OUTPUT, help="Go on with a conversation that /save has written."),
    ] = None,
    template: Annotated[
        bool | None,
        typer.Option(rich_help_panel=OUTPUT, help="Render turns by the chat template.", show_default="if there is one"),
    ] = None,
    method: LoadedMethodOption = None,
    preset: PresetOption = None,
    budget: BudgetOption = None,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
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
    compile: CompileOption = None,
) -> None:
    """Talk to a model: turns are appended to one cache that stays within its budget. /help lists the commands."""
    options = with_fields({} if budget is None else {"budget": budget}, field)
    policy = None
    if method or load_file is None:
        policy = make_policy(method or "restkv", preset, options)  # what cannot be is refused before anything is loaded
    if load_file is not None and (system is not None or template is not None or prefill != "dense"):
        raise PromptError(
            f"{load_file}: a saved chat has its system prompt, template and prefill; drop --system, --template and --prefill"
        )

    from restkv.chat import Chat
    from restkv.lm import load
    from restkv.results import Decoding
    from restkv.talk import Talk

    lm = load(model, device=device, dtype=dtype, backend=backend, compile="auto" if compile is None else compile)
    decoding: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
    }
    if template and not lm.tokenizer.has_chat_template:
        raise PromptError(f"{model}: has no chat template; drop --template, and turns are lines")
    if load_file is None:
        assert policy is not None
        conversation = Chat(lm, policy, system, template=template, prefill=prefill)
    else:
        conversation = Chat.load(load_file, lm)
        before = conversation.anew().policy
        if policy is None:  # the saved one, in which what is given is replaced
            policy = make_policy(before.name, preset, _kept_options(before, preset, options) | options)
        if policy != before:
            conversation.change(policy)
    Decoding(**decoding)  # what no turn could use is refused before a line is read
    conversation.check()
    Talk(conversation, lambda name, words: make_policy(name, None, dict(map(parse_field, words))), decoding).run()


def _kept_options(saved: Policy, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What stays of a saved policy's options: all of them; beside a preset the budget alone, unless the preset has one."""
    if preset:
        return {} if "budget" in saved.PRESETS.get(preset, {}) else {"budget": saved.budget}
    kept = {option.name: getattr(saved, option.name) for option in fields(saved)}
    # A default that goes by the budget was saved as what it came to; another kind of budget may mean another.
    by_default = type(saved).budget_by is None and replace(saved, budget_by=None) == saved
    if by_default and isinstance(given.get("budget"), tuple):
        del kept["budget_by"]
    return kept


# -- restkv warmup


@app.command()
def warmup(
    model: ModelArgument = str(RECALL),
    method: MethodOption = "restkv",
    preset: PresetOption = None,
    budget: BudgetOption = None,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
    prompt_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=KEEP, help="Length of the prompts to come, where the budget does not bound the cache."
        ),
    ] = 2048,
    max_new_tokens: LengthOption = 128,
    rows: Annotated[int, typer.Option(rich_help_panel=KEEP, help="Prompts answered at a time.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compile ahead: later runs with the same model, method and lengths find their kernels made."""
    policy = make_policy(method, preset, with_fields({} if budget is None else {"budget": budget}, field))

    from restkv.compiling import keep_kernels
    from restkv.lm import load
    from restkv.warmup import warm_up

    lm = load(model, device=device, dtype=dtype, compile=True)
    warmed = warm_up(lm, policy, prompt_tokens, max_new_tokens, rows, prefill)
    print(
        f"{warmed.graphs} graphs compiled: first token after {warmed.first_s:.1f} s, the next after "
        f"{1e3 * warmed.next_s:.1f} ms; a prompt of {prompt_tokens} tokens took {warmed.prefill_s:.1f} s"
    )
    print(f"kernels are kept in {keep_kernels() or 'a folder for temporary files: the cache folder cannot be written'}")


# -- restkv methods, restkv inspect


@app.command()
def methods(
    sizes_of: Annotated[
        str | None, typer.Option("--bytes", metavar="MODEL", help="Show what each method's cache of this model holds.")
    ] = None,
    context: ContextOption = None,
    budget: BudgetOption = None,
) -> None:
    """List the methods with their options, defaults and presets; or, with --bytes, what their caches hold."""
    from restkv.display import bytes_table, layer_entries, methods_table, table_console

    if sizes_of is None:
        if context is not None or budget is not None:
            raise PromptError("--context and --budget size the caches of a model; give it with --bytes MODEL")
        table, common = methods_table()
        table_console().print(table, common)
        return
    from modeling.loading import load_outline, resolve
    from restkv.policies import FullCache, known_policies

    outline = load_outline(resolve(sizes_of))
    context = context or outline.config.max_positions
    policies: list[Policy] = []
    refusals: list[PolicyError] = []
    for name in known_policies():
        if name == FullCache.name:
            continue
        try:
            policy = sizing_policy(name, budget)
            layer_entries(policy, context, outline.config.num_layers)
            policies.append(policy)
        except PolicyError as error:  # what cannot take the budget, or is broken, costs its own line only
            refusals.append(error)
    if not policies:
        raise refusals[0]
    for refusal in refusals:
        warnings.warn(f"left out: {refusal}", RestKVWarning, stacklevel=2)
    table_console().print(bytes_table(sizes_of, outline, context, [*policies, FullCache()]))


@app.command()
def inspect(
    model: ModelArgument = str(RECALL),
    context: ContextOption = None,
    budget: BudgetOption = None,
    dtype: DtypeOption = "auto",
    kept: Annotated[  # for --help: `main` has sent such a line to the other command
        bool,
        typer.Option("--kept", help="Show what each head keeps of a text: `restkv bench kept`, which has the options."),
    ] = False,
) -> None:
    """Show a checkpoint's shapes, its parameters and the bytes its KV cache takes; weights are not read."""
    from modeling.loading import load_outline, resolve
    from restkv.display import checkpoint_table, layer_entries, table_console

    outline = load_outline(resolve(model), dtype)
    context = context or outline.config.max_positions
    entries = layer_entries(sizing_policy("restkv", budget), context, outline.config.num_layers)
    table_console().print(checkpoint_table(model, outline, context, entries))


if __name__ == "__main__":
    sys.exit(main())

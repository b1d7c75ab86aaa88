"""`restkv warmup`, `methods` and `inspect`: what comes before a prompt."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from modeling.errors import RestKVWarning
from restkv.cli.groups import spread
from restkv.cli.options import (
    FILE_NAME,
    MOST_ROWS,
    MOST_TEXT,
    RECALL,
    BudgetOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    LoadOptions,
    MethodOption,
    ModelArgument,
    PrefillOption,
    PresetOption,
    SetOption,
    WeightsOption,
    keep_option,
    make_policy,
    sizing_policy,
    with_fields,
)
from restkv.cli.terminal import put_line, status
from restkv.errors import PolicyError, PromptError, RestKVError

if TYPE_CHECKING:
    from restkv.policies import Policy


@spread
def warmup(
    model: ModelArgument = str(RECALL),
    method: MethodOption = "restkv",
    preset: PresetOption = None,
    budget: BudgetOption = None,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
    prompt_tokens: Annotated[
        int,
        keep_option(max=MOST_TEXT, help="Length of the prompts to come, where the budget does not bound the cache."),
    ] = 2048,
    max_new_tokens: LengthOption = 128,
    rows: Annotated[int, keep_option(max=MOST_ROWS, help="Prompts answered at a time.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
) -> None:
    """Compile ahead: later runs with the same model, method and lengths find their kernels made."""
    policy = make_policy(method, preset, with_fields({} if budget is None else {"budget": budget}, field))

    from restkv.kernels import kernel_folder
    from restkv.warmup import warm_up

    folder = kernel_folder()
    lm = LoadOptions(dtype, device, "flex", weights).load(model)
    status.show("compiling, which takes a minute or two")
    warmed = warm_up(lm, policy, prompt_tokens, max_new_tokens, rows, prefill)
    put_line(
        f"{warmed.graphs} graphs compiled: first token after {warmed.first_s:.1f} s, the next after "
        f"{1e3 * warmed.next_s:.1f} ms; a prompt of {prompt_tokens} tokens took {warmed.prefill_s:.1f} s\n"
        f"kernels are kept in {folder}"
    )


@spread
def methods(
    sizes_of: Annotated[
        str | None,
        typer.Option("--bytes", metavar="MODEL", help="Show what each method's cache of this model holds."),
        FILE_NAME,
    ] = None,
    context: ContextOption = None,
    budget: BudgetOption = None,
) -> None:
    """List the methods with their options, defaults and presets; or, with --bytes, what their caches hold."""
    from restkv.cli.console import table_console
    from restkv.cli.display import bytes_table, layer_entries, methods_table

    if sizes_of is None:
        if context is not None or budget is not None:
            raise PromptError("--context and --budget size the caches of a model; give it with --bytes MODEL")
        table, common = methods_table()
        table_console().print(table, common)
        return
    from modeling.checkpoint.loading import load_outline, resolve
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


@spread
def inspect(
    model: ModelArgument = str(RECALL),
    context: ContextOption = None,
    budget: BudgetOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks", help="Show what 2, 4 and 8 ranks that share the model would send one another, and hold."
        ),
    ] = False,
    kept: Annotated[  # for --help, and so is `mask`: `main` has sent such a line to the other command
        bool,
        typer.Option("--kept", help="Show what each head keeps of a text: `restkv bench kept`, which has the options."),
    ] = False,
    mask: Annotated[
        bool,
        typer.Option("--mask", help="Show which pages each head reads: `restkv bench mask`, which has the options."),
    ] = False,
) -> None:
    """Show a checkpoint's shapes, its parameters, the bytes its KV cache takes, and what each probe (`restkv generate --probe`)
    costs a prompt of --context tokens: tokens read besides, steps, bytes alive at once. Weights are not read."""
    from modeling.checkpoint.loading import load_outline, resolve
    from modeling.text.tokenizer import Tokenizer
    from restkv.cli.console import table_console
    from restkv.cli.display import checkpoint_table, layer_entries, probes_table, ranks_table
    from restkv.phrases import Phrases

    folder = resolve(model)
    outline = load_outline(folder, dtype, weights=weights)
    context = context or outline.config.max_positions
    policy = sizing_policy("restkv", budget)
    entries = layer_entries(policy, context, outline.config.num_layers)
    try:
        phrases = Phrases(Tokenizer.from_folder(folder))
    except RestKVError:  # shapes can be shown without one
        phrases = Phrases()
    table_console().print(checkpoint_table(model, outline, context, entries), probes_table(outline, context, phrases))
    if ranks:
        table_console().print(ranks_table(outline, context, policy))

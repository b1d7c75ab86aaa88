"""`restkv chat`: its options, and what a saved chat makes of them. The talk itself is in talk.py."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from restkv.cli.groups import spread
from restkv.cli.options import (
    RECALL,
    UNNAMED,
    WHAT_STAYS,
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
    note_escapes,
    parse_field,
    parse_template_args,
    text_option,
    with_fields,
)
from restkv.errors import PromptError

if TYPE_CHECKING:
    from restkv.policies import Policy


@spread
def chat(
    *,
    model: ModelArgument = str(RECALL),
    system: Annotated[str | None, text_option(help="Instructions; never evicted.")] = None,
    load_file: Annotated[
        Path | None, text_option("--load", help="Go on with a conversation that /save has written.")
    ] = None,
    template: Annotated[
        bool | None, text_option(help="Render turns by the chat template.", show_default="if there is one")
    ] = None,
    template_name: TemplateNameOption = None,
    template_arg: TemplateArgOption = None,
    method: Annotated[
        str | None, keep_option(help=WHAT_STAYS, show_default=f"that of the chat that is loaded, or {UNNAMED}")
    ] = None,
    preset: PresetOption = None,
    budget: BudgetOption = None,
    field: SetOption = None,
    prefill: PrefillOption = "dense",
    sampling: SamplingOptions,
    where: LoadOptions,
) -> None:
    """Talk to a model: turns are appended to one cache that stays within its budget. /help lists the commands."""
    note_escapes("--system", system or "")
    decoding = sampling.decoding()
    options = with_fields({} if budget is None else {"budget": budget}, field)
    policy = None
    if method or load_file is None:
        policy = make_policy(method, preset, options, prefill)  # what cannot be is refused before anything is loaded
    template_args = parse_template_args(template_arg)
    if load_file is not None and (system is not None or template is not None or prefill != "dense"):
        raise PromptError(
            f"{load_file}: a saved chat has its system prompt, template and prefill; drop --system, --template and --prefill"
        )
    if load_file is not None and (template_name is not None or template_args):
        raise PromptError(
            f"{load_file}: a saved chat has its template and what it is given; drop --template-name and --template-arg"
        )

    from restkv.chat import Chat
    from restkv.cli.talk import Talk
    from restkv.kernels import announce_compiling
    from restkv.results import Decoding

    lm = where.load(model)
    announce_compiling(lm.compiled)
    if template and not lm.tokenizer.has_chat_template:
        raise PromptError(f"{model}: has no chat template; drop --template, and turns are lines")
    if load_file is None:
        assert policy is not None
        conversation = Chat(
            lm,
            policy,
            None if system is None else given_text(system),
            template=template,
            template_name=template_name,
            template_args=template_args,
            prefill=prefill,
        )
    else:
        conversation = Chat.load(load_file, lm)
        before = conversation.anew().policy
        if policy is None:  # the saved one, in which what is given is replaced
            policy = make_policy(before.name, preset, _kept_options(before, preset, options) | options)
        if policy != before:
            conversation.change(policy)

    def policy_of(name: str, words: list[str]) -> Policy:
        return make_policy(name, None, dict(parse_field(word, "/method") for word in words))

    Decoding(**decoding)  # what no turn could use is refused before a line is read
    conversation.check()
    Talk(conversation, policy_of, decoding).run()


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

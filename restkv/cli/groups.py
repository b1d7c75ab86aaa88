"""Commands as typer wants them: option groups spread out, and texts that are UTF-8 whatever the locale says.

A group is what several commands take alike: a dataclass of options, and one parameter of each command.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from restkv.cli.options import FILE_NAME, reading


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it, every option a parameter: a group has given way to its fields, in its place.

    A group that is a parameter's default gives its options theirs; without one they are those of the fields. Options that are
    texts come to the command as `_text` reads them.
    """
    parameters: list[Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if not is_dataclass(kind):
            parameters.append(parameter)
            continue
        groups[name], hints = kind, get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            own = Parameter.empty if field.default is MISSING else field.default
            default = own if parameter.default is Parameter.empty else getattr(parameter.default, field.name)
            parameters.append(
                Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
            )

    texts = {one.name: option for one in parameters if (option := _text_option(one))}

    @wraps(command)
    def flat(**given: Any) -> None:
        for name in texts.keys() & given.keys():
            value = given[name]
            if isinstance(value, str):
                given[name] = _text(value, texts[name])
            elif value:
                given[name] = [_text(one, texts[name]) for one in value]
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    flat.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _text_option(parameter: Parameter) -> str | None:
    """What a parameter that is a text, or a list of them, is called on the command line; None for any other."""
    kind = parameter.annotation
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    bare = get_args(kind)[0] if marks else kind
    if FILE_NAME in marks or not any(one in (str, list[str]) for one in (bare, *get_args(bare))):
        return None
    infos = [mark for mark in marks if isinstance(mark, OptionInfo)]
    spelled = [str(name) for info in infos for name in (info.default, *(info.param_decls or ()))]  # typer's first one
    return next((name for name in spelled if name.startswith("--")), f"--{parameter.name.replace('_', '-')}")


def _text(given: str, option: str) -> str:
    """A text of the command line: its bytes, which Python has decoded by the locale, are read as UTF-8.

    Raises:
        PromptError: they are not UTF-8.
    """
    try:
        raw = os.fsencode(given)
    except UnicodeEncodeError:  # no command line holds it: it was given by a caller in Python
        raw = given.encode(errors="surrogatepass")
    with reading(option):
        return raw.decode()

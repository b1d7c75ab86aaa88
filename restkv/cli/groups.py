"""Option groups: what several commands take alike is a dataclass of options, and one parameter of each command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it, every option a parameter: a group has given way to its fields, in its place.

    A group that is a parameter's default gives its options theirs; without one they are those of the fields.
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

    @wraps(command)
    def flat(**given: Any) -> None:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    flat.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat

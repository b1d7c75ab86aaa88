"""`restkv fuzz`: a method on random cases, and the smallest that breaks a law as a script."""

from __future__ import annotations

from typing import Annotated

import typer

from restkv.cli.groups import spread
from restkv.cli.options import (
    MOST_SAMPLES,
    BudgetOption,
    PresetOption,
    SetOption,
    make_policy,
    with_fields,
)
from restkv.cli.terminal import put, put_line, say, status
from restkv.errors import RestKVError

MOST_SEED = 1 << 32


@spread
def fuzz(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A method of `restkv methods`; those of plugins are, too.")
    ],
    examples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Observations to draw, and a tenth as many sessions.")
    ] = 200,
    preset: PresetOption = None,
    budget: BudgetOption = None,
    field: SetOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="The same seed draws the same cases.")] = 0,
) -> None:
    """Does a method keep the laws of eviction? If not, the smallest case that breaks one is printed as a Python script."""
    policy = make_policy(name, preset, with_fields({} if budget is None else {"budget": budget}, field))
    try:
        from restkv.testing import LAWS, LawBroken, check_policy
        from restkv.testing.laws import GROUPS
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise RestKVError("restkv fuzz needs hypothesis; pip install 'restkv[testing]'") from None

    cases = 0
    try:
        for group in GROUPS:
            report = check_policy(
                policy,
                examples=examples,
                seed=seed,
                laws=[law.name for law in group],
                progress=lambda law, count: status.show(f"{law}: {count} cases"),
            )
            for law, count in report.cases.items():
                cases += count
                say(f"{law:<11} kept in {count} cases: {LAWS[law].says}")
            for note in report.notes:
                say(f"note: {note}")
    except LawBroken as broken:
        say(f"restkv: {broken}")
        put(broken.script())
        raise typer.Exit(1) from None
    put_line(f"{name}: keeps all {len(LAWS)} laws in {cases} cases")

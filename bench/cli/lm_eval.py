"""`restkv bench lm-eval`: lm-evaluation-harness with restkv among its model types."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from typing import Annotated

import typer

from restkv.cli.groups import spread
from restkv.errors import OutputError, PromptError, RestKVError, RestKVWarning

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # context settings of the command


@spread
def lm_eval(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="restkv, or any other of the harness's model types.")] = "restkv",
) -> None:
    """Run lm-evaluation-harness (extra: eval); all other options are its own, see `lm_eval run --help`.

    Such as: restkv bench lm-eval --model_args pretrained=DIR,method=restkv,budget=512 --tasks arc_easy
    """
    if find_spec("lm_eval") is None:
        raise OutputError("lm-evaluation-harness is not installed; install it with: pip install 'restkv[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import bench.harness  # noqa: F401 - registers the model type

    command, rest = "run", context.args
    if rest[:1] in (["run"], ["ls"], ["validate"]):
        command, *rest = rest
    if command == "run":
        rest = ["--model", model, *rest]
    sys.argv = ["lm_eval", command, *rest]
    warnings.simplefilter("once", RestKVWarning)  # a remark on a batch is not one on the next
    try:
        cli_evaluate()
    except RestKVError:
        raise
    except ValueError as error:  # a task that there is not, for instance
        raise PromptError(f"lm-eval: {error} (`restkv bench lm-eval ls tasks` lists what there is)") from error

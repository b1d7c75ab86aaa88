"""The commands of `restkv`, plugins among them, and how errors and remarks are said: in one line on stderr.

torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any

import typer

from modeling.errors import RestKVError, RestKVWarning
from modeling.room import lacking
from modeling.shown import one_line, shown
from modeling.text.characters import brief
from restkv import __version__
from restkv.cli.chat import chat
from restkv.cli.commands import add_commands
from restkv.cli.generate import generate
from restkv.cli.options import SPINS
from restkv.cli.sizes import inspect, methods, warmup
from restkv.cli.terminal import announcing, prepare, put_line, say, silence, status, writing
from restkv.files import described
from restkv.plugins import entry_points

app = typer.Typer(
    name="restkv",
    help="Long prompts, small KV caches: generate text while keeping only the entries that matter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def execute(arguments: list[str]) -> int:
    prepare()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch starts its threads
    if arguments[:1] == ["inspect"] and "--kept" in arguments:  # only the other command knows what may follow
        arguments = ["bench", "kept", *(word for word in arguments[1:] if word != "--kept")]
    with warnings.catch_warnings(), announcing():
        warnings.simplefilter("always", RestKVWarning)
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            code = _run(arguments)
            with writing():
                sys.stdout.flush()
            return code
        except RestKVError as error:
            return _fail(str(error))
        except typer.TyperException as error:
            return _fail(error.format_message() + _value(error))
        except BrokenPipeError:
            return 141
        except (MemoryError, RuntimeError, ImportError, OSError) as error:
            if (asked := lacking(error)) is not None:
                return _fail(f"not enough memory{asked}; ask for less (lengths, rows, --dtype), or free some")
            if not isinstance(error, OSError):
                raise
            return _fail(described(error))  # a full disk, a checkpoint that vanishes
        finally:
            status.clear()
            try:
                sys.stdout.flush()
            except OSError:
                silence(sys.stdout)  # the interpreter would try once more, and complain


def _run(arguments: Sequence[str]) -> int:
    try:
        command = _command()
        with command.make_context("restkv", arguments) as context:
            command.invoke(context)
    except typer.Exit as exit:
        return exit.exit_code
    except SystemExit as exit:  # rich's consoles make one of a broken pipe
        if isinstance(exit.__context__, BrokenPipeError):
            raise exit.__context__ from None
        raise
    return 0


@cache
def _command() -> Any:
    """The commands of this file, and those that installed packages register."""
    add_commands(app, entry_points(group="restkv.commands"))
    return typer.main.get_command(app)


def _fail(text: str) -> int:
    say(f"restkv: error: {one_line(text)}")
    return 2


def _value(error: Exception) -> str:
    """The value that typer has refused as a number, which it does not name when it says the bound."""
    cause = error.__cause__
    found: list[Any] = getattr(cause, "errors", list)()
    given = found[0].get("input") if found else None
    return "" if given is None or str(given) in str(error) else f", not {brief(given)}"


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    if issubclass(category, RestKVWarning):
        say(f"restkv: note: {one_line(str(message))}")
    else:
        status.clear()
        otherwise(shown(str(message)), category, *place)


def _version(asked: bool) -> None:
    if asked:
        put_line(f"restkv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        context.get_help()  # typer prints it itself
        raise typer.Exit


for one in (generate, chat, warmup, methods, inspect):
    app.command()(one)

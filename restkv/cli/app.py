"""The commands of `restkv`, plugins among them, and how errors and remarks are said: in one line on stderr.

torch is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.machinery import ModuleSpec
from typing import Annotated, Any

import typer

from modeling.environment import cannot_import, more_memory
from modeling.errors import ParallelError, RestKVError, RestKVWarning, TooLargeError
from modeling.free import free_addresses, size_text
from modeling.room import lacking
from modeling.shown import one_line, shown
from modeling.text.characters import brief
from restkv import __version__
from restkv.cli import ranks, terminal
from restkv.cli.chat import chat
from restkv.cli.commands import add_commands
from restkv.cli.fuzz import fuzz
from restkv.cli.generate import generate
from restkv.cli.options import SPINS
from restkv.cli.quantize import quantize
from restkv.cli.sizes import inspect, methods, warmup
from restkv.cli.terminal import announcing, prepare, put_line, say, silence, status, writing
from restkv.files import described
from restkv.plugins import entry_points

# What is imported while a command runs, and reads environment variables when it is.
PACKAGES = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich", "matplotlib", "huggingface_hub"}

VIEWS = ("kept", "mask")  # of a cache after a prompt: commands of bench, and flags of inspect

TORCH_TAKES = 600_000_000  # bytes of addresses, of the smallest of its builds

app = typer.Typer(
    name="restkv",
    help="Long prompts, small KV caches: generate text while keeping only the entries that matter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def execute(arguments: list[str]) -> int:
    prepare()
    ranks.hush()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch starts its threads
    view = next((view for view in VIEWS if f"--{view}" in arguments), None)
    if view is not None and arguments[:1] == ["inspect"]:  # only the other command knows what may follow
        arguments = ["bench", view, *(word for word in arguments[1:] if word != f"--{view}")]
    with warnings.catch_warnings(), announcing(), _roomy():
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
        except Exception as error:
            if (reason := _not_ours(error)) is None:
                raise
            return _fail(reason)
        finally:
            status.clear()
            try:
                sys.stdout.flush()
            except OSError:
                silence(sys.stdout)  # the interpreter would try once more, and complain


class _Roomy:
    """A finder that finds nothing: it sees that torch is about to be imported, and whether there are addresses for it.

    With too few, the libraries that torch loads end the process themselves.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        free = free_addresses() if name == "torch" else None
        if free is not None and free < TORCH_TAKES:
            raise TooLargeError(
                f"torch cannot be imported: it takes {size_text(TORCH_TAKES)} of addresses, {size_text(free)} are free under "
                "ulimit -v; raise that"
            )
        return None


@contextmanager
def _roomy() -> Iterator[None]:
    """Inside, torch is not imported where it cannot be."""
    finder: Any = _Roomy
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _not_ours(error: Exception) -> str | None:
    """The line for what the environment, a disk or lack of memory did, wherever it happened. None: a bug."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package in PACKAGES:
            return cannot_import(package, error)
    if (asked := lacking(error)) is not None:
        return f"not enough memory{asked}; ask for less (lengths, rows, --dtype), or {more_memory()}"
    if (reason := ranks.lost(error)) is not None:
        return reason
    return described(error) if isinstance(error, OSError) else None  # a full disk, a checkpoint that vanishes


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
    if ranks.may_speak():
        say(f"restkv: error: {ranks.prefix()}{one_line(text)}", urgent=True)
    return 2


def _value(error: Exception) -> str:
    """The value that typer has refused as a number, which it does not name when it says the bound."""
    cause = error.__cause__
    found: list[Any] = getattr(cause, "errors", list)()
    given = found[0].get("input") if found else None
    return "" if given is None or str(given) in str(error) else f", not {brief(given)}"


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    if terminal.hushed:
        return
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
    if (size := ranks.place()[1]) > 1 and context.invoked_subcommand not in ranks.COMMANDS:
        raise ParallelError(
            f"restkv {context.invoked_subcommand}: runs in one process, and torchrun has started {size}; start it without, or "
            "run restkv generate"
        )


for one in (generate, chat, warmup, methods, inspect, quantize, fuzz):
    app.command()(one)

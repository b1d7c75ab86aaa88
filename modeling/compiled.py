"""torch.compile that proves that it has compiled, with errors that say what to do.

FlexAttention is right only in a compiled graph: without the compiler it ignores its block lists, and nothing says so. Torch's
compiler can be switched off in many ways, also after a graph has been made. So such a function begins with `only_compiled`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from modeling.environment import blamed, first_line
from modeling.errors import CompileError, TooManyShapes
from modeling.quant import INT4

Result = TypeVar("Result")


@torch.library.custom_op("restkv::only_compiled", mutates_args=())
def only_compiled(x: Tensor) -> Tensor:
    """x, in a graph that inductor has compiled, at no cost. Run in any other way it raises.

    Apply it first, to an input that all else needs: then nothing has been computed, and nothing written, when it raises.

    Raises:
        CompileError: what runs is not a compiled graph.
    """
    raise not_compiled()


@only_compiled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@functools.cache
def teach_inductor() -> None:
    """Have inductor, and no other backend of torch.compile, know `only_compiled`, and dynamo einops. Loads the compiler."""
    from torch._inductor.lowering import fallback_handler, register_lowering

    register_lowering(torch.ops.restkv.only_compiled.default, type_promotion_kind=None)(lambda x: x)
    # Inductor's own lowering holds the group size in a tensor, which regions of nested_compile_region take for one of another
    # region's (torch 2.13): the operator is called as it is.
    packed = getattr(torch.ops.aten, INT4, None)
    if packed is not None:
        register_lowering(packed.default, type_promotion_kind=None)(fallback_handler(packed.default))
    # Dynamo would trace einops' parser of patterns too, and at every call look at all that it reads: 100 guards more per step.
    for function in (rearrange, reduce, repeat):
        torch.compiler.allow_in_graph(function)


def compiled(function: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """torch.compile(function, fullgraph=True, dynamic=False, **options): it raises where it cannot compile, and never falls back.

    `function` has to begin with `only_compiled`, unless it computes the same without a compiler.

    Raises (when called):
        CompileError: the compiler is off, or what makes machine code failed, for want of a C++ compiler for instance. Nothing has
            been run then.
        TooManyShapes: torch.compile's limit of graphs for one function is reached. Nothing has been run then either.
    """
    name = function.__name__.strip("_")

    @functools.cache
    def made() -> Callable[..., Result]:
        if switched_off():  # torch.compile would remember it
            raise not_compiled()
        try:
            teach_inductor()
            return torch.compile(function, fullgraph=True, dynamic=False, backend="inductor", **options)
        except Exception as error:  # not a line of the function has been looked at
            raise cannot_compile(name, error) from error

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Result:
        run = made()
        try:
            return run(*arguments, **named)
        except Exception as error:
            if (
                type(error).__name__ == "FailOnRecompileLimitHit"
            ):  # its module is loaded by then, and costs seconds before
                raise TooManyShapes(f"{name!r} has been compiled for too many shapes") from error
            if _before_it_ran(error):
                raise cannot_compile(name, error) from error
            raise

    return call


def _before_it_ran(error: Exception) -> bool:
    """Whether torch raised this before the graph was run: in making it, or in refusing to."""
    from torch._dynamo import exc  # loaded only now: compiling has imported it anyway

    # The stance "fail_on_recompile" has no type of its own.
    return isinstance(error, exc.TorchDynamoException | exc.FailOnRecompileLimitHit) or "fail_on_recompile" in str(
        error
    )


def cannot_compile(name: str, error: Exception) -> CompileError:
    """`error`, said in a line; `name` is what was to be compiled."""
    variables = " and ".join(f"{name}={os.environ[name]}" for name in blamed("torch", error))
    mend = f"correct or unset {variables}" if variables else "mend that"
    return CompileError(
        f"{name!r} cannot be compiled here: {_reason(error)}; {mend}, or use the backend sdpa, which compiles nothing"
    )


def _reason(error: Exception) -> str:
    """What failed, in a line: the message holds whole graphs and traces."""
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return "there is no working C++ compiler (g++)"
    return first_line(getattr(error, "inner_exception", error))  # torch's own first line says only which backend raised


def not_compiled() -> CompileError:
    """What to raise where FlexAttention is about to run without being compiled."""
    switch, mend = switched_off() or _passed_over() or ("by a setting of torch.compile", "take that back")
    return CompileError(
        f"torch's compiler is off ({switch}), without which FlexAttention computes something else: {mend}, or use the "
        "backend sdpa, which compiles nothing"
    )


def switched_off() -> tuple[str, str] | None:
    """What keeps torch.compile from compiling anything in this process, and how to undo it; None if nothing does."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1", "unset it"
    dynamo: Any = sys.modules.get("torch._dynamo")
    off = os.environ.get("TORCH_COMPILE_DISABLE") == "1" if dynamo is None else dynamo.config.disable
    if not off:
        return None
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1", "unset it"
    return "torch._dynamo.config.disable", "set it to False"


def _passed_over() -> tuple[str, str] | None:
    """Why something else than a graph of inductor's has run, and how to undo it, as far as torch lets one see it."""
    frames, config = (sys.modules.get(f"torch._{part}") for part in ("dynamo.eval_frame", "inductor.config"))
    stance = getattr(frames, "_stance", None)
    backend, name = getattr(stance, "backend", None), getattr(stance, "stance", "default")
    if backend is not None or name != "default":
        asked = repr(name) if backend is None else f"force_backend={backend!r}"
        return f"torch.compiler.set_stance({asked})", 'set the stance "default"'
    for variable in (
        "TORCH_COMPILE_OVERRIDE_BACKENDS",
        "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS",
        "TORCH_BISECT_BACKEND",
    ):
        if os.environ.get(variable):
            return f"{variable}={os.environ[variable]}", "unset it"
    if getattr(config, "fallback_by_default", False):
        return "torch._inductor.config.fallback_by_default", "set it to False"
    return None

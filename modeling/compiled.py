"""torch.compile, with an error that says what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from modeling.errors import CompileError, TooManyShapes

Result = TypeVar("Result")


def compiled(function: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """torch.compile(function, fullgraph=True, dynamic=False, **options): it raises where it cannot compile, and never falls back.

    Raises (when called):
        CompileError: what makes machine code failed, for want of a C++ compiler for instance. Nothing has been run then.
        TooManyShapes: torch.compile's limit of graphs for one function is reached. Nothing has been run then either.
    """
    run = torch.compile(function, fullgraph=True, dynamic=False, **options)

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        try:
            return run(*arguments)
        except Exception as error:
            from torch._dynamo.exc import (  # loaded only now: compiling has imported it anyway
                BackendCompilerFailed,
                FailOnRecompileLimitHit,
            )

            if isinstance(error, FailOnRecompileLimitHit):
                raise TooManyShapes(
                    f"{function.__name__.strip('_')!r} has been compiled for too many shapes"
                ) from error
            if not isinstance(error, BackendCompilerFailed):
                raise
            raise CompileError(
                f"{function.__name__.strip('_')!r} cannot be compiled here: {_reason(error)}; mend that, or use the backend "
                "sdpa, which compiles nothing"
            ) from error

    return call


def _reason(error: Exception) -> str:
    """What failed, in a line: the message holds whole graphs and traces."""
    if "InvalidCxxCompiler" in str(error):
        return "there is no working C++ compiler (g++)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__

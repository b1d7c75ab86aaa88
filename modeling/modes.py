"""Torch's modes around a call: whatever a caller has switched on, our numbers are made under torch's defaults.

Autocast would multiply in another dtype, a default dtype or device would change tensors that are made on the way, and what is
made under inference_mode could not be written to outside of it. Deterministic mode is set aside too: it refuses operations on
CUDA (cumsum), and nothing here writes to a place twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._contextlib import _NoParamDecoratorContextManager

_thread = threading.local()


class own_modes(_NoParamDecoratorContextManager):
    """Decorates a function or a generator, which then runs under torch's default modes and without gradients.

    A generator gives the caller's modes back whenever it yields. Calls within such a call cost nothing more.
    """

    def __enter__(self) -> None:
        self._undo: ExitStack | None = None
        if getattr(_thread, "inside", False):
            return
        # A text comes in pieces, and each leaves the call and comes back to it: only what is on is switched off.
        with ExitStack() as undo:
            if torch.is_inference_mode_enabled():
                undo.enter_context(torch.inference_mode(False))
            if torch.is_grad_enabled():
                undo.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    torch.set_autocast_enabled(kind, False)
                    undo.callback(torch.set_autocast_enabled, kind, True)
            if torch.get_default_device().type != "cpu":
                undo.enter_context(torch.device("cpu"))
            _process.enter()
            undo.callback(_process.leave)
            self._undo = undo.pop_all()
        _thread.inside = True

    def __exit__(self, *_: object) -> None:
        if self._undo is not None:
            _thread.inside = False
            self._undo.close()


class _Process:
    """Modes of the whole process: the first call under way sets them, the last one of any thread gives them back."""

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._undo: list[Callable[[], Any]] = []

    def enter(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls > 1:
                return
            dtype = torch.get_default_dtype()
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
                self._undo.append(lambda: torch.set_default_dtype(dtype))
            if torch.are_deterministic_algorithms_enabled():
                only = torch.is_deterministic_algorithms_warn_only_enabled()
                torch.use_deterministic_algorithms(False)
                self._undo.append(lambda: torch.use_deterministic_algorithms(True, warn_only=only))

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            while not self._calls and self._undo:
                self._undo.pop()()


_process = _Process()

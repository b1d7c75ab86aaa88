"""Torch's modes around a call: whatever a caller has switched on, our numbers are made under torch's defaults.

Autocast would multiply in another dtype, a default dtype or device would change tensors that are made on the way, and what is
made under inference_mode could not be written to outside of it. Narrower products of float32 and choices of attention kernels are
set aside, and deterministic mode, which refuses operations on CUDA (cumsum); nothing here writes to a place twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
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


def _all_kernels() -> Iterator[Callable[[], Any]]:
    """Let SDPA take any of its kernels; what undoes it."""
    cuda = torch.backends.cuda
    for enabled, enable in (
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    ):
        if not enabled():
            enable(True)
            yield partial(enable, False)


def _exact_products() -> Iterator[Callable[[], Any]]:
    """Have float32 multiplied as float32; what undoes it."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set backend by backend, which this cannot read
        backends: Any = torch.backends
        for backend in (backends.mkldnn.matmul, backends.cuda.matmul):
            if (precision := backend.fp32_precision) not in ("none", "ieee"):
                backend.fp32_precision = "ieee"
                yield partial(setattr, backend, "fp32_precision", precision)
        return
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        yield partial(torch.set_float32_matmul_precision, precision)


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
            self._undo += [*_all_kernels(), *_exact_products()]

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            while not self._calls and self._undo:
                self._undo.pop()()


_process = _Process()

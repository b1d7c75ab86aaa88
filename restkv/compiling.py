"""When a job repays compiling its decode step on a CPU, where the compiled kernels are kept, and making them ahead of time.

An eager step starts at once; a compiled one takes less time per token, after some seconds of compiling that only the first
process pays in full (docs/performance.md has what that took once).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import torch

from modeling.layers import Decoder
from modeling.pages import KVCache

# Seconds until the first compiled token: with kernels to be made, and with kernels that a process before has left.
COLD, WARM = 40.0, 6.0
GAIN = 0.5  # share of an eager step that compiling is taken to save; docs/performance.md has what it saved where it was measured
EAGER_TOKENS = 8  # after so many the time of an eager step is known


def keep_kernels() -> Path | None:
    """Have inductor keep its kernels in the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another.

    Its own default is a folder for temporary files, which does not outlive the machine's next start; it is left in place (None)
    where the cache folder cannot be made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restkv" / "inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def repays(lap: float, tokens: int, warm: bool) -> bool:
    """Whether compiling now saves more time than it takes.

    Args:
        lap: seconds of an eager step.
        tokens: still to come, at most.
        warm: a process has compiled the step before.
    """
    return lap * GAIN * tokens > (WARM if warm else COLD)


class Mark:
    """An empty file in the folder of the kernels: the decode step of a model over a cache of this shape is among them."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        folder = keep_kernels()
        tensors = [*(tensor for view in cache.views() for tensor in view), *cache.queries]
        shapes = [None if tensor is None else (tuple(tensor.shape), tensor.stride()) for tensor in tensors]
        step = (model.config, model.dtype, model.device.type, cache.rows, cache.window, shapes)
        built = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
        name = hashlib.sha256(repr((step, built)).encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / "restkv-steps" / name

    @property
    def stands(self) -> bool:
        return self._path is not None and self._path.exists()

    def leave(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):  # only a later decision would have profited
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()

"""What has to be there before anything is compiled: a compiler that is switched on, and a folder for its kernels."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from modeling.compiled import cannot_compile, not_compiled, switched_off
from restkv.errors import CompileError, RestKVWarning

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
LINKING = 60  # seconds


def announce_compiling(compiled: bool) -> None:
    """Warn before an answer that its second token takes long: a remark in the middle of its first line would stand in the way."""
    if compiled:
        warnings.warn(
            "after the first token the step is compiled: some seconds with kernels of an earlier run (restkv warmup makes them "
            "too), else up to a minute",
            RestKVWarning,
            stacklevel=3,
        )


def check_compiler(device: torch.device) -> None:
    """Find out what can be known beforehand, and say where kernels are kept (keep_kernels).

    Raises:
        CompileError: torch cannot compile for this device.
    """
    try:
        if switched_off():
            raise not_compiled()
        keep_kernels()
        importlib.import_module("torch._dynamo")  # it looks at the environment
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except CompileError:
        raise
    except Exception as error:  # whatever a variable that it cannot parse makes of its import
        raise cannot_compile("decode", error) from error


def keep_kernels() -> Path:
    """Have torch keep its kernels in `kernel_folder`, or, with one warning, in a temporary one while this process lives.

    Raises:
        OSError: no folder for temporary files can be written either.
    """
    try:
        folder = kernel_folder()
    except CompileError as error:
        folder = Path(_temporary_folder().name)
        warnings.warn(str(error), RestKVWarning, stacklevel=2)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ[FOLDER] = str(folder)
    _drop_unfinished(folder)
    return folder


def kernel_folder() -> Path:
    """The folder that $TORCHINDUCTOR_CACHE_DIR names, or restkv's in the user's cache folder. It is made if need be.

    Torch's own default is a folder for temporary files, which does not outlive the machine's next start.

    Raises:
        CompileError: it cannot be written, or the cache folder is another user's (who could not write there any more).
    """
    named = os.environ.get(FOLDER)
    try:
        folder = Path(named or _in_cache()).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not named and folder.stat().st_uid != os.geteuid():
            raise PermissionError(0, "it belongs to another user", str(folder))
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        reason = f"{error.filename or 'the folder'}: {error.strerror}" if isinstance(error, OSError) else error
        raise CompileError(f"compiled kernels cannot be kept ({reason}); set {FOLDER} to a folder of yours") from None


@cache  # once in a process
def _drop_unfinished(folder: Path) -> None:
    """Delete the empty libraries of processes killed while they compiled: torch would load them and fail, at every later run.

    One that another process is writing now is no older than LINKING.
    """
    for library in folder.glob("*/*.so"):
        with suppress(OSError):  # another process may have been first
            state = library.stat()
            if not state.st_size and time.time() - state.st_mtime > LINKING:
                library.unlink()


def _in_cache() -> Path:
    """RuntimeError: nobody knows where this user is at home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restkv" / "inductor"


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that only this user can read, and that goes with the process."""
    return tempfile.TemporaryDirectory(prefix="restkv-", ignore_cleanup_errors=True)

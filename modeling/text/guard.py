"""One guard around every call into the library `tokenizers`: whatever goes wrong in it is one line.

Its panics are no Exception: pyo3 raises them as a BaseException, after Rust has written them to file descriptor 2. No setting
keeps them off the terminal, so that descriptor points to memory while a guarded call runs. What others write to it meanwhile
follows right afterwards; only of a call that panicked it is dropped.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from modeling.errors import RestKVError, TokenizerError

STDERR = 2
LONGEST_REASON = 300  # characters
_redirecting = threading.Lock()


@contextlib.contextmanager
def guarded(place: str, doing: str) -> Iterator[None]:
    """Run calls into `tokenizers`.

    Args:
        place: the folder or file in question, and `doing`, what is being done there: both are named in errors.
    Raises:
        TokenizerError: the library refused or panicked. An interrupt, an exit or a lack of memory passes through.
    """
    try:
        with _quiet():
            yield
    except (RestKVError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or _is_panic(error):
            raise TokenizerError(
                f"{place}: {doing} failed in tokenizers ({reason(error)}); download its files again"
            ) from None
        raise


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # a class that cannot be imported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what is written to stderr, and drop it if there was a panic.

    One thread at a time: others then write to the same memory, or, for a moment, to stderr as ever.
    """
    if not hasattr(os, "memfd_create") or not _redirecting.acquire(blocking=False):
        yield
        return
    try:
        try:
            usual, memory = os.dup(STDERR), os.memfd_create("stderr")
        except OSError:  # stderr is closed, or there are no more descriptors
            yield
            return
        panicked = False
        os.dup2(memory, STDERR)
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(usual, STDERR)
            os.close(usual)
            if not panicked:
                _write(memory)
            os.close(memory)
    finally:
        _redirecting.release()


def _write(memory: int) -> None:
    """Write to stderr what has been kept back."""
    size = os.fstat(memory).st_size
    if size:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(STDERR, os.pread(memory, size, 0))

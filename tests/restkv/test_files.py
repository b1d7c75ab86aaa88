"""Files that are replaced as a whole: by several processes at once, by ones that are killed, and where nothing can be written."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.report.figures import new_figure, save_png
from make.small import small_ids, small_model
from restkv import files
from restkv.cli import main
from restkv.cli.sink import Sink
from restkv.context import CompressedContext
from restkv.errors import OutputError
from restkv.files import described, replaced, require_writable, write_text
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV

FORK = multiprocessing.get_context(
    "fork"
)  # a process that has to import torch first is killed before it saves anything


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".restkv-")]


# -- kept whole


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with replaced(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: Any) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises((KeyboardInterrupt, ValueError, OutputError)), replaced(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_content_and_name_are_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    write_text(tmp_path / "file", "new")
    assert len(synced) == 2 and Path(synced[0]).parent == tmp_path and synced[1] == str(tmp_path)


def test_what_a_dead_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    (ready, say_ready), (go_on, say_go_on) = os.pipe(), os.pipe()

    def hang(place: Path) -> None:
        with replaced(place) as file:
            file.write(b"half")
            file.flush()
            os.write(say_ready, b".")
            os.read(go_on, 1)

    dead = FORK.Process(target=hang, args=(path,))
    dead.start()
    os.read(ready, 1)
    os.kill(dead.pid or 0, signal.SIGKILL)
    dead.join()
    (left,) = leftovers(tmp_path)
    assert left.read_bytes() == b"half"
    write_text(other, "x")
    assert leftovers(tmp_path) == [left]  # another name's are not looked at
    live = FORK.Process(target=hang, args=(path,))
    live.start()
    os.read(ready, 1)
    write_text(path, "new")
    (still,) = leftovers(tmp_path)
    assert still != left and path.read_text() == "new"
    os.write(say_go_on, b".")
    live.join(60)
    assert live.exitcode == 0 and path.read_text() == "half" and not leftovers(tmp_path)


def test_a_temporary_file_that_another_takes_for_a_dead_ones_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock another writer may lock it, and remove it."""
    flock = fcntl.flock
    taken: list[int] = []

    def first_is_taken(number: int, how: int) -> None:
        if not taken:
            taken.append(number)
            raise BlockingIOError
        if len(taken) == 1:
            taken.append(number)
            os.unlink(os.readlink(f"/proc/self/fd/{number}"))
        flock(number, how)

    monkeypatch.setattr(files.fcntl, "flock", first_is_taken)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and len(taken) == 2


def test_threads_that_write_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(number) * 50_000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(5):
            write_text(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


# -- modes, names and places


def test_links_modes_and_names_of_any_length(tmp_path: Path) -> None:
    path, link = tmp_path / ("n" * 255), tmp_path / "link"
    write_text(path, "a")
    path.chmod(0o604)
    link.symlink_to(path.name)
    write_text(link, "b")
    assert link.is_symlink() and path.read_text() == "b" and path.stat().st_mode & 0o777 == 0o604
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "c")
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_the_owner_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "a")
    try:
        os.chown(path, 12345, 12345)
    except PermissionError:
        pytest.skip("only root gives files away")
    write_text(path, "b")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(place: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(place) == str(path):
            raise PermissionError(13, "Permission denied")
        return opened(place, flags, *rest, **named)

    opened = os.open
    monkeypatch.setattr(files.os, "access", lambda place, how: False)  # root may write anywhere
    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(OutputError, match=r"file: cannot be written \(Permission denied\); choose another place"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["a\0b", "half \ud800", "n" * 256, "no/such", ""])
def test_names_that_cannot_be_are_one_line(name: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/{name}" if name else ""
    for write in (require_writable, lambda place: write_text(place, "x")):
        with pytest.raises(OutputError, match="cannot be written") as error:
            write(path)
        assert str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_which_and_how_much_room_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for write in (lambda: write_text(tmp_path / "a", "x"), lambda: save_png(new_figure(1, 1), tmp_path / "a")):
        with pytest.raises(OutputError) as error:
            write()
        form = rf"{tmp_path}/a: cannot be written \(No space left on device\); the disk of {tmp_path} has [\d,.]+ MB left; free"
        assert re.match(form, str(error.value))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_stdout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").touch()
    error = OSError(28, "No space left on device")
    for place, form in (
        (
            tmp_path / "out",
            rf"stdout \({tmp_path}/out\): cannot be written \(No space left on device\); the disk of {tmp_path} has",
        ),
        ("pipe:[123]", r"stdout: cannot be written \(No space left on device\); send it elsewhere"),
    ):
        monkeypatch.setattr(files.os, "readlink", lambda number, place=place: str(place))
        assert re.match(form, described(error))
    assert described(PermissionError(13, "Permission denied", "weights")) == "weights: Permission denied"
    assert described(OSError(110, "Connection timed out")) == "Connection timed out"


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    """A real error of the system in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_text(tmp_path / "a", "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"a: cannot be written \(File too large\)"):
            write_text(tmp_path / "a", "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# -- generate --output


def test_an_answer_replaces_the_file_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "answer"
    path.write_text("old")
    sink = Sink(path)
    sink.write("new ")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    sink.write("text")
    sink.close()
    assert path.read_text() == "new text"
    Sink(path).write("never closed")
    assert path.read_text() == "new text" and list(tmp_path.iterdir()) == [path]


def test_an_answer_goes_to_pipes_and_devices_as_it_is_made(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="nobody reads from this pipe"):
        Sink(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    sink = Sink(pipe)
    sink.write("first")
    assert os.read(reader, 100) == b"first"
    sink.close()
    os.close(reader)
    null = Sink(Path("/dev/null"))
    null.write("x")
    null.close()
    full = Sink(Path("/dev/full"))
    with pytest.raises(OutputError, match=r"^/dev/full: cannot be written \(No space left on device\)"):
        full.write("x" * 100_000)
    full.close()
    assert Path("/dev/null").is_char_device() and Path("/dev/full").is_char_device()


def test_the_command_names_a_folder_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "nowhere", "-p", "x", "-o", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"restkv: error: {tmp_path}: cannot be written (it is a folder); choose another place\n"
    )


# -- several processes, some of them killed


Part = dict[str, Any]  # numbers that one process counts


class Counts:
    """Numbers that several processes count, each its own part: a lock would stay taken by one that is killed while it counts."""

    NAMES = ("loads", "unlike", "failed", "saves")

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def part(self) -> Part:
        """For a process that is about to be started."""
        self.parts.append({name: FORK.Value("q", 0, lock=False) for name in self.NAMES})
        return self.parts[-1]

    def __getitem__(self, name: str) -> int:
        return sum(part[name].value for part in self.parts)


def save_for_ever(contexts: list[CompressedContext], path: Path, busy: Any, counts: Part) -> None:
    while True:
        for context in contexts:
            busy.value = 1
            context.save(path)
            busy.value = 0
            counts["saves"].value += 1


def load_for_ever(lm: LM, path: Path, known: set[str], counts: Part) -> None:
    """Bytes are compared, and what load makes of them."""
    while True:
        counts["unlike"].value += hashlib.sha256(path.read_bytes()).hexdigest() not in known
        try:
            CompressedContext.load(path, lm)
        except Exception:
            counts["failed"].value += 1
        counts["loads"].value += 1


def started(target: Callable[..., None], *arguments: object) -> Any:
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def save_and_kill(folder: Path, rounds: int) -> dict[str, int]:
    """Two savers and two readers on one path; the savers are killed at a random moment in every round."""
    lm = LM(small_model(4, windows=(None,) * 4), None)
    contexts = [lm.compress(small_ids(70, 1), ReSTKV(20, window=4)), lm.compress(small_ids(900, 2), FullCache())]
    path, known = folder / "context", set()
    for context in contexts:
        context.save(path)
        known.add(hashlib.sha256(path.read_bytes()).hexdigest())
    counts, rng = Counts(), random.Random(17)
    found = {"rounds": rounds, "killed": 0, "killed while saving": 0, "temporary files left by a kill": 0}
    readers = [started(load_for_ever, lm, path, known, counts.part()) for _ in range(2)]
    for _ in range(rounds):
        before = counts["saves"]
        busy = [FORK.Value("b", 0, lock=False) for _ in range(2)]
        savers = [
            started(save_for_ever, contexts[::step], path, flag, counts.part())
            for step, flag in zip((1, -1), busy, strict=True)
        ]
        while counts["saves"] == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        for saver, flag in zip(savers, busy, strict=True):
            kill(saver)
            found["killed"] += 1
            found["killed while saving"] += flag.value
        found["temporary files left by a kill"] += len(leftovers(folder))
        assert hashlib.sha256(path.read_bytes()).hexdigest() in known
    for reader in readers:
        assert reader.is_alive()
        kill(reader)
    found |= {name: counts[name] for name in ("saves", "loads", "unlike", "failed")}
    contexts[0].save(path)
    assert [entry.name for entry in folder.iterdir()] == ["context"]  # the next save removes what the killed ones left
    return found


def test_readers_see_whole_files_while_savers_are_killed(tmp_path: Path) -> None:
    found = save_and_kill(tmp_path, 4)
    assert found["unlike"] == found["failed"] == 0 and found["loads"] > 0


@pytest.mark.slow
def test_a_hundred_rounds_of_saves_and_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = save_and_kill(tmp_path, 100)
    with capsys.disabled():
        print("\n", found)
    assert found["unlike"] == found["failed"] == 0
    assert found["killed while saving"] > 20 and found["loads"] > 100

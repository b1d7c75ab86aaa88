"""The process that renders chat templates: it serves, dies, hangs, forks and ends with its parent."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from make.places import ROOT
from modeling.errors import TokenizerError
from modeling.text import renderer
from modeling.text.renderer import Renderer


def child_of(one: Renderer) -> subprocess.Popen[bytes]:
    assert one._child is not None
    return one._child.process


# -- the process


SLOW = "{{ x }}{% if x == 'slow' %}{% set n = 9 %}{{ n ** (n ** n) }}{% endif %}"


@pytest.fixture
def one():
    return Renderer(SLOW, "here")


def test_a_process_serves_all_texts_and_is_replaced_when_it_has_died(monkeypatch):
    one = Renderer(SLOW, "here")
    assert [one.text({"x": n}) for n in range(3)] == ["0", "1", "2"]
    first = child_of(one)
    first.kill()
    assert one.text({"x": "again"}) == "again" and first.poll() is not None
    second = child_of(one)
    monkeypatch.setattr(renderer, "SECONDS", 0.1)
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"0\.1 s of processor time"):
            one.text({"x": "slow"})
    assert second.poll() is not None and one.text({"x": "after"}) == "after"
    third = child_of(one)
    del one
    assert third.poll() is not None


def test_a_process_that_is_killed_at_work_is_one_line(one):
    timer = threading.Timer(0.3, lambda: child_of(one).send_signal(signal.SIGTERM))
    timer.start()
    with pytest.raises(TokenizerError, match="its process was ended by signal 15"):
        one.text({"x": "slow"})
    timer.join()


def test_a_process_that_hangs_is_one_line(one, monkeypatch):
    assert one.text({"x": 1}) == "1"
    child_of(one).send_signal(signal.SIGSTOP)
    monkeypatch.setattr(renderer, "WALL_SECONDS", 0.3)
    with pytest.raises(TokenizerError, match="it takes longer than 0 s"):
        one.text({"x": 2})
    monkeypatch.undo()
    assert one.text({"x": 3}) == "3"


def test_an_answer_that_nobody_waited_for_is_not_the_next_one(one, monkeypatch):
    """As after Ctrl-C between a request and its answer."""
    read = json.loads

    def interrupted(line):
        monkeypatch.setattr(renderer.json, "loads", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(renderer.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.text({"x": 1})
    assert one.text({"x": 2}) == "2"


def test_threads_take_turns(one):
    said: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        said[number] = [one.text({"x": f"{number} {turn}"}) for turn in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: [f"{number} {turn}" for turn in range(20)] for number in range(6)}
    assert one.text({"x": "the thread that started it has ended"}).startswith("the thread")


def answered(one: Renderer, answers) -> None:
    answers.put((one.text({"x": "forked"}), child_of(one).pid))


def test_a_fork_has_a_process_of_its_own(one):
    assert one.text({"x": "parent"}) == "parent"
    pid = child_of(one).pid
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    one._lock.acquire()  # as another thread may at that moment
    worker = context.Process(target=answered, args=(one, answers), daemon=True)
    worker.start()
    one._lock.release()
    said, theirs = answers.get(timeout=60)
    worker.join()
    assert said == "forked" and theirs != pid
    assert one.text({"x": "parent still"}) == "parent still" and child_of(one).pid == pid


def test_copies_start_anew(one):
    assert one.text({"x": 1}) == "1"
    assert pickle.loads(pickle.dumps(one)).text({"x": 2}) == "2"


SCRIPT = """
import os, sys, time
from modeling.text.renderer import Renderer
one = Renderer("{{ x }}", "here")
said = one.text({"x": "said"})
os.write(int(sys.argv[1]), f"{said} {one._child.process.pid}".encode())
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


def runs(pid: str) -> bool:
    """Whether there is such a process; one that nobody waits for stays in the table when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_it_ends_with_its_parent_and_needs_nothing_of_it(end, tmp_path):
    """Under env -i, with no standard stream open, in a folder that is gone."""
    reading, writing = os.pipe()
    python = f'PYTHONPATH={ROOT} exec {sys.executable} -W error -c "$SCRIPT" {writing} {end}'
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", f"cd {gone} && rmdir {gone} && SCRIPT='{SCRIPT}' && {python} <&- >&- 2>&-"]
    ran = subprocess.run(command, env={}, pass_fds=[writing], timeout=60)
    os.close(writing)
    said, _, pid = os.read(reading, 100).decode().partition(" ")
    os.close(reading)
    assert (said, ran.returncode) == ("said", 0 if end == "exit" else -9)
    deadline = time.monotonic() + 30
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(pid)


USER = """
import os
from modeling.text import renderer
from modeling.text.renderer import Renderer
renderer.SECONDS = 0.1
one = Renderer("{{ x }}{% if x == 'slow' %}{% set n = 9 %}{{ n ** (n ** n) }}{% endif %}", "here")
print(one.text({"x": "root"}))
os.setuid(12345)
print(one.text({"x": "nobody"}))
try:
    one.text({"x": "slow"})
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_process_outlives_a_change_of_user():
    """Who may not signal it, and may not start another if Python lies in root's home."""
    ran = subprocess.run([sys.executable, "-c", USER], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[:2] == ["root", "nobody"] and "s of processor time" in ran.stdout, ran.stderr


def test_it_is_given_nothing_it_does_not_need(one, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with (tmp_path / "file").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        one.text({"x": 1})
    place = Path("/proc") / str(child_of(one).pid)
    assert b"secret" not in (place / "environ").read_bytes()
    held = {os.readlink(entry).partition(":")[0] for entry in (place / "fd").iterdir()}
    assert held == {"socket", "/dev/null"}
    assert os.readlink(place / "cwd") == "/"


def test_a_machine_that_starts_no_process_is_one_line(one, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(renderer.subprocess, "Popen", refused)
    with pytest.raises(
        TokenizerError, match=r"here: the chat template cannot be rendered, .*temporarily unavailable.*allow"
    ):
        one.text({"x": 1})
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TokenizerError, match="exit code 1; see whether /bin/false can import jinja2"):
        one.text({"x": 1})
    monkeypatch.setattr(sys, "executable", "/no/such/python")  # as out of reach as one in the home of a former user
    assert one.text({"x": 1}) == "1"


def test_the_clock_is_the_callers(rendered, monkeypatch):
    class Then(renderer.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 29, 13, 5, 9, 17)

    monkeypatch.setattr(renderer.datetime, "datetime", Then)
    assert rendered("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}") == "29 Feb 2024 13:05:09.000017"

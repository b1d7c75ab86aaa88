"""`restkv chat` through a pipe and through a terminal, and every example of docs/chat-and-contexts.md."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import restkv
from make.chats import SYSTEM, TURNS, say
from make.places import ROOT
from restkv.chat import Chat
from restkv.cli import main
from restkv.lm import LM
from restkv.policies import ReSTKV, get_policy


@pytest.fixture(scope="module")
def lm(rambler) -> LM:
    return restkv.load(rambler)


# -- restkv chat


OPTIONS = ["--budget", "64", "--set", "interval=16"]


@pytest.fixture
def command(rambler) -> list[str]:
    return [sys.executable, "-m", "restkv", "chat", str(rambler), *OPTIONS]


@pytest.fixture
def talk(rambler, capsys, monkeypatch):
    """talk(lines, *options): `restkv chat` in this process, fed through a pipe: exit code, stdout, lines of stderr."""

    def run(lines: str | bytes, *options: object):
        raw = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        code = main(["chat", str(rambler), "-n", "8", *map(str, options)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def test_a_pipe_gets_answers_and_no_prompt(talk, lm):
    chat = Chat(lm, ReSTKV(64), SYSTEM)
    expected = "".join(say(chat, turn.strip(), max_new_tokens=8).text + "\n" for turn in TURNS)
    lines = "\n".join(turn.strip() for turn in TURNS)
    assert talk(lines, "--budget", 64, "--system", SYSTEM) == (0, expected, [])
    assert talk("", "--budget", 64) == (0, "", [])
    assert talk("\n\n/quit \nTom\n") == (0, "", [])
    assert len(talk(" /quit\nTom\n")[1].splitlines()) == 2  # behind a space it is a message


def test_commands_of_a_chat(talk, lm, tmp_path):
    place = tmp_path / "my talk"
    code, out, err = talk(
        f"/stats\n{TURNS[0]}\n/stats\n/save '{place}'\n/method snapkv budget=40 window=8 interval=4\n{TURNS[1]}\n/stats\n"
        f"/load '{place}'\n{TURNS[1]}\n/new\n/stats\n{TURNS[0]}\n/help\n /not a command\n",
        *("--budget", 64, "--method", "h2o"),
    )
    assert code == 0
    answers = out.splitlines()
    assert answers[0] == answers[3] and len(answers) == 5
    assert err[0] == "h2o: nothing said yet"
    assert err[1].startswith("h2o: kept ") and err[2].startswith("first token after ")
    assert err[3] == f"saved to {place}"
    assert err[4].startswith("snapkv: kept ") and err[5].startswith("snapkv: kept ")
    assert err[7].startswith("h2o: kept ")
    assert err[8:10] == ["a new conversation, with h2o", "h2o: nothing said yet"]
    assert any("/method NAME" in line for line in err[10:])
    chat = Chat.load(place, lm)
    assert chat.policy == get_policy("h2o", budget=64)


def test_mistakes_cost_a_line_each(talk, tmp_path):
    (tmp_path / "junk").write_text("junk")
    mistakes = {
        "/dance": "/dance: no such command; /help lists them",
        "/": "",
        "/method": "/method: give NAME [OPTION=VALUE ...]",
        "/method magic": "method 'magic' is unknown",
        "/method snapkv colour=red": "option 'colour' is unknown",
        "/method snapkv budget": "is not NAME=VALUE",
        "/method restkv budget=0.5": "a chat grows",
        f"/load {tmp_path}/nothing": "no such file",
        f"/load {tmp_path}/junk": "cannot be read as a saved context",
        f"/save {tmp_path}": "cannot be written",
        f"/save {tmp_path}/no/file": "cannot be written",
        "/method snapkv budget_by=1": "budget_by 1: choose from uniform",
        "/save": "/save: give one file",
        f"/load {tmp_path}": "is a folder",
        "/stats now": "no such command",
        "/save 'half": "No closing quotation",
    }
    code, out, err = talk("Tom\n" + "\n".join(mistakes) + "\nLily\n")
    assert code == 0 and len(out.splitlines()) == 2
    errors = [line for line in err if line.startswith("restkv: error: ")]
    expected = [words for words in mistakes.values() if words]
    assert len(errors) == len(expected)
    for line, words in zip(errors, expected, strict=True):
        assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junk"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-n", "0"), "max_new_tokens=0"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--seed", str(1 << 64)), f"seed={1 << 64}"),
        (("--template",), "no chat template; drop --template"),
        (("--budget", "64", "--set", "budget=40"), "--budget and --set budget: one option given twice"),
        (("--budget", "37", "--system", "word " * 30), "no room for the system prompt"),
    ],
)
def test_what_no_turn_could_use_is_refused_before_the_first(talk, options, words):
    code, out, err = talk("Tom\n", *options)
    assert (code, out, len(err)) == (2, "", 1) and words in err[0]


def test_a_saved_chat_keeps_its_method_and_options_unless_others_are_given(talk, tmp_path):
    place = tmp_path / "talk"
    talk(f"Tom\n/save {place}\n", "--method", "snapkv", "--budget", 48, "--set", "window=16", "--set", "kernel_size=3")
    for options, told in (
        ((), {"name": "snapkv", "budget": 48, "window": 16, "kernel_size": 3}),
        (("--budget", 64), {"name": "snapkv", "budget": 64, "window": 16, "kernel_size": 3}),
        (("--set", "window=8"), {"name": "snapkv", "budget": 48, "window": 8, "kernel_size": 3}),
        (("--method", "restkv", "--budget", 48), {"name": "restkv", "budget": 48, "window": 32, "kernel_size": 5}),
        (("--preset", "official"), {"name": "snapkv", "budget": 48, "window": 32, "granularity": "query"}),
        (("--preset", "official", "--budget", 64), {"name": "snapkv", "budget": 64, "window": 32}),
    ):
        policy = saved_again(talk, place, *options)
        assert {name: policy[name] for name in told} == told


def saved_again(talk, place: Path, *options: object) -> dict:
    """The policy with which a saved chat goes on under these options."""
    again = place.with_name("again")
    assert talk(f"/save {again}\n", "--load", place, *options)[0] == 0
    with safe_open(again, "pt") as file:
        return json.loads(file.metadata()["about"])["policy"]


def test_a_preset_that_names_a_budget_replaces_the_saved_one(talk, tmp_path):
    place = tmp_path / "talk"
    talk(f"Tom\n/save {place}\n", "--method", "h2o", "--budget", 48)
    assert saved_again(talk, place, "--preset", "paper")["budget"] == 48
    assert saved_again(talk, place, "--preset", "official")["budget"] == 516


def test_a_saved_chat_takes_a_budget_per_layer(talk, tmp_path):
    """The default way to share a budget out goes by what kind of budget it is."""
    place = tmp_path / "talk"
    talk(f"Tom\n/save {place}\n", "--budget", 48)
    policy = saved_again(talk, place, "--budget", "40,40,40,40")
    assert (policy["budget"], policy["budget_by"]) == ([40] * 4, {"name": "uniform"})


def test_beginning_with_a_saved_chat(talk, tmp_path):
    place = tmp_path / "talk"
    options = ("--budget", 64)
    _, both, _ = talk(f"{TURNS[0]}\n{TURNS[1]}\n", *options, "--system", SYSTEM)
    talk(f"{TURNS[0]}\n/save {place}\n", *options, "--system", SYSTEM)
    after = both.splitlines()[1]
    assert talk(TURNS[1], "--load", place) == (0, f"{after}\n", [])
    assert talk(TURNS[1], "--load", place, *options) == (0, f"{after}\n", [])
    code, _, err = talk("/stats\n", "--load", place, "--budget", 30, "--set", "window=8")
    assert code == 0 and err[0].startswith("restkv: kept 30 of ")
    code, _, err = talk("", "--load", place, "--system", "Be kind.")
    assert code == 2 and err == [
        f"restkv: error: {place}: a saved chat has its system prompt, template and prefill; "
        "drop --system, --template and --prefill"
    ]
    code, _, err = talk("", "--budget", "0.5")
    assert code == 2 and len(err) == 1 and "a chat grows" in err[0]


def test_lines_that_are_no_text(talk):
    code, out, err = talk(b"Tom \xff\xfe ran\n\xf0\x9f\x98\x80\n")
    assert (code, err) == (0, []) and len(out.splitlines()) >= 2
    assert talk(b"\xef\xbb\xbfTom\n") == talk(b"Tom\n")


def test_two_interrupts_stop_at_once_and_the_chat_goes_on(talk, monkeypatch):
    """One within a step waits for the step's end; a second one is raised there, and the layers are read anew."""
    from restkv import engine

    step, calls = engine._decode, 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        for _ in range({3: 1, 7: 2}.get(calls, 0)):
            signal.raise_signal(signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(engine, "_decode", interrupted)
    code, out, err = talk(f"{TURNS[0]}\n{TURNS[1]}\n{TURNS[2]}\n/stats\n", "--method", "full", "-n", 8)
    assert code == 0
    short, shorter, whole = out.splitlines()
    assert short and 0 < len(shorter) < len(whole)
    assert err[0] == "stopped" and err[1].startswith("full: kept ")


class Terminal:
    """`restkv chat` on a pseudo-terminal of its own."""

    def __init__(self, command: list[str], *options: str) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [*command, *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=self._take_over,
        )
        os.close(theirs)
        self.seen = ""

    @staticmethod
    def _take_over() -> None:
        """In the child: Ctrl-C of this terminal comes here, and is listened to even if the tests run in the background."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait_for(self, words: str, after: int = 0) -> int:
        """Read until the words have been shown; the place after them."""
        deadline = time.monotonic() + 120
        while words not in self.seen[after:]:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{words!r} not in {self.seen[after:]!r}"
            try:
                self.seen += os.read(self._ours, 4096).decode()
            except OSError:  # the other side is closed
                raise AssertionError(f"it ended without {words!r}: {self.seen!r}") from None
        return self.seen.index(words, after) + len(words)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def interrupt_until_it_ends(self) -> None:
        """Press Ctrl-C like a person who presses it again when nothing happens: readline only notices a signal while it
        waits, and one that comes just before is noticed at the next key."""
        for _ in range(12):
            self.type("\x03")
            try:
                self._process.wait(timeout=5)
                return
            except subprocess.TimeoutExpired:
                pass

    def ends(self) -> int:
        return self._process.wait(timeout=60)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


def test_a_terminal_shows_a_prompt_and_ctrl_c_stops_the_answer(command):
    with Terminal(command, "-n", "900") as terminal:
        place = terminal.wait_for("> ")
        assert "/help lists the commands" in terminal.seen
        terminal.type(TURNS[0] + "\n")
        place = terminal.wait_for("\n", terminal.wait_for(TURNS[0], place))
        place = terminal.wait_for(" ", place)  # the answer is on its way
        terminal.type("\x03")
        place = terminal.wait_for("> ", place)
        terminal.type("/stats\n")
        place = terminal.wait_for("restkv: kept ", place)
        place = terminal.wait_for("> ", place)
        terminal.type(TURNS[1] + "\n")
        # Only what comes after the echoed line is the answer: an interrupt before it would find the prompt and end the chat.
        place = terminal.wait_for("\n", terminal.wait_for(TURNS[1].strip(), place))
        place = terminal.wait_for(" ", place)
        terminal.type("\x03")
        terminal.wait_for("> ", place)
        terminal.type("\x04")
        assert terminal.ends() == 0
        assert "Traceback" not in terminal.seen and "KeyboardInterrupt" not in terminal.seen


def test_ctrl_c_at_the_prompt_ends_the_chat(command):
    with Terminal(command, "-n", "4") as terminal:
        terminal.wait_for("> ")
        terminal.type("half a li")
        terminal.wait_for("half a li")
        terminal.interrupt_until_it_ends()
        assert terminal.ends() == 0
        assert "Traceback" not in terminal.seen


def test_a_reader_that_goes_away_ends_the_chat(command):
    with subprocess.Popen(
        [*command, "-n", "400"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# -- docs/chat-and-contexts.md


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "chat-and-contexts.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)
    assert found
    return found


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A folder from which the paths of the page can be reached, and where its files may be written."""
    (tmp_path / "restkv").symlink_to(ROOT / "restkv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_in_python(root, capsys):
    """Its blocks run one after the other; what it says is printed is printed."""
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/chat-and-contexts.md", "exec"), names)
        out = capsys.readouterr().out
        for promised in re.findall(r"^print\(.*\)  # (.*)$", block, re.M):
            assert promised in " ".join(out.split())


def test_the_page_in_the_shell(root):
    (root / "bin").mkdir()
    (root / "bin" / "restkv").write_text(f'#!/bin/sh\nexec {sys.executable} -m restkv "$@"\n')
    (root / "bin" / "restkv").chmod(0o755)
    environment = {**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in blocks("bash"):
        ran = subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0 and "error" not in ran.stderr, ran.stderr
        assert len(ran.stdout.splitlines()) >= 3 and "snapkv: kept 48" in ran.stderr

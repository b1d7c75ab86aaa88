"""One mistake never ends a chat: whatever a line asks for, the next turn is what it would have been without that line."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

import restkv
from make.chats import SYSTEM, TURNS, say
from modeling.text import renderer
from restkv import policies
from restkv.chat import Chat
from restkv.cli import main, talk
from restkv.cli.options import parse_field
from restkv.errors import PolicyError, RestKVError
from restkv.lm import LM
from restkv.observe import Observation
from restkv.policies import ReSTKV, SnapKV, StreamingLLM

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def lm(rambler) -> LM:
    return restkv.load(rambler)


class Unspeakable(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


ANYTHING = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes"),
    MemoryError(),
    OSError(28, "No space left on device"),
    BrokenPipeError(32, "Broken pipe"),
    RecursionError("maximum recursion depth exceeded"),
    UserWarning("a warning turned error"),
    ValueError("two\nlines and \x1b]52;c;Zm9v\x07 a clipboard"),
    AssertionError(),
    StopIteration(3),
    SystemExit(3),
    Unspeakable(),
]


@dataclass(frozen=True)
class Failing(ReSTKV):
    """A policy of a plugin that works for some evictions, and then raises what it finds in `raises`."""

    name: ClassVar[str] = "failing"
    raises: ClassVar[BaseException] = RuntimeError("broken")
    works: ClassVar[int] = 0

    def importance(self, obs: Observation) -> Tensor:
        if Failing.works <= 0:
            raise Failing.raises
        Failing.works -= 1
        return super().importance(obs)


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setitem(policies.POLICIES, "failing", Failing)
    monkeypatch.setattr(Failing, "works", 0)
    return Failing


# -- in Python


@pytest.mark.parametrize("error", ANYTHING[-3:], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("policy", [ReSTKV(40, window=8, interval=4), StreamingLLM(40)])
def test_a_change_that_fails_leaves_no_trace(error, policy, lm, failing, monkeypatch):
    """Decode-time eviction included: what the cache held before the change, it holds after."""
    monkeypatch.setattr(failing, "raises", error)
    chat, twin = Chat(lm, policy, SYSTEM), Chat(lm, policy, SYSTEM)
    for turn in TURNS[:2]:
        say(chat, turn)
        say(twin, turn)
    before = chat.policy, chat.session, list(chat.tokens), list(chat.messages)
    for works in (0, 2):
        failing.works = works
        with pytest.raises((type(error), RuntimeError)):
            chat.change(failing(44, window=8))
        assert (chat.policy, chat.session, chat.tokens, chat.messages) == before
    assert say(chat, TURNS[2]).tokens == say(twin, TURNS[2]).tokens
    assert chat.stats and twin.stats and chat.stats.kept == twin.stats.kept


@pytest.mark.parametrize("error", ANYTHING[-3:], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("works", [4, 6, 9])
def test_a_turn_that_fails_is_no_part_of_the_chat(error, works, lm, failing, monkeypatch):
    """In the first eviction of the turn, or in the middle of one, with tokens of an answer already said."""
    monkeypatch.setattr(failing, "raises", error)
    failing.works = 4
    chat = Chat(lm, failing(40, window=8, interval=None))
    say(chat, TURNS[0])
    chat.change(SnapKV(40, window=8, interval=None))
    failing.works = 4
    chat.change(failing(40, window=8, interval=5))
    before = list(chat.tokens), list(chat.messages), chat.policy
    failing.works = works - 4
    with pytest.raises((type(error), RuntimeError)):
        say(chat, TURNS[1], max_new_tokens=20)
    assert (chat.tokens, chat.messages, chat.policy) == before
    failing.works = 1000
    again = say(chat, TURNS[2])
    alone = lm.generate([*before[0], *lm.tokenizer.encode_more(f"\n{TURNS[2]}\n")], before[2], max_new_tokens=10)
    assert again.tokens == alone.tokens


def test_a_first_turn_that_fails_protects_nothing(lm, failing):
    """What it spared of the system prompt's first tokens would be protected for ever."""
    chat, twin = Chat(lm, failing(36, window=8), SYSTEM), Chat(lm, ReSTKV(36, window=8), SYSTEM)
    with pytest.raises(RuntimeError, match="broken"):
        say(chat, TURNS[0])
    assert (chat.tokens, len(chat.messages), chat.policy.protect) == ([], 1, ())
    chat.change(ReSTKV(36, window=8))
    assert say(chat, TURNS[1]).tokens == say(twin, TURNS[1]).tokens
    assert chat.policy == twin.policy


# -- at the prompt


OPTIONS = "-n 8 --budget 40 --set window=8 --set interval=4"


@pytest.fixture
def talked(rambler, capsys, monkeypatch):
    """talked(lines): `restkv chat` in this process: answers, lines of stderr."""

    def run(lines: list[str], model: Path = rambler, options: str = OPTIONS) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), "utf-8"))
        code = main(["chat", str(model), *options.split()])
        out, err = capsys.readouterr()
        assert code == 0
        return out.splitlines(), err.splitlines()

    return run


MISTAKES = {
    "/method snapkv budget=99999999999": "give a number below",
    f"/method snapkv budget=1{'0' * 400}": "give a number below",
    f"/method snapkv budget=1{'0' * 5000}": "budget",
    f"/method restkv tau={'9' * 400}": "tau",
    "/method restkv scale=1e999": "give a number, a word",
    "/method restkv tau=NaN": "give a number, a word",
    f"/method snapkv window={DEEP}": "give a number, a word",
    "/method snapkv window='{\"a\":[1]}'": "window",
    "/method snapkv window='\"x\"'": "window",
    "/method snapkv kernel_size=[1]": "kernel_size",
    "/method snapkv protect=[[0,1],3]": "protect",
    "/method snapkv budget_by=[1]": "budget_by",
    "/method snapkv budget=[40]": "budget",
    f"/method {'x' * 5000}": "is unknown",
    "/method sn\x00apkv": "is unknown",
    "/method \x1b]0;title\x07": "\\x1b]0;title\\x07",
    f"/load {'a' * 300}": "",
    f"/load {'a/' * 3000}": "",
    "/load a\x00b": "",
    "/load /": "is a folder",
    "/load /dev/null": "",
    "/load ''": "",
    f"/save {'a' * 300}": "",
    "/save a\x00b": "",
    "/save /": "cannot be written",
    "/save /proc/self/none/x": "",
    "/save /dev/null": "",
    "/save ''": "cannot be written",
    "/load 'half": "No closing quotation",
    "/\x07bell": "\\x07bell",
    "/": None,
}


def test_every_mistake_costs_one_line_and_changes_nothing(talked):
    with_mistakes = [TURNS[0], *MISTAKES, TURNS[1], "/stats", TURNS[2]]
    out, err = talked(with_mistakes)
    expected, stats = talked([TURNS[0], TURNS[1], "/stats", TURNS[2]])
    assert out == expected and len(out) == 3
    errors = [line for line in err if line.startswith("restkv: error: ")]
    assert len(errors) == sum(words is not None for words in MISTAKES.values())
    for line, words in zip(errors, (words for words in MISTAKES.values() if words is not None), strict=True):
        assert words in line
        assert len(line) < 6000 and all(character.isprintable() for character in line)
    kept = [[line for line in said if line.startswith("restkv: kept")] for said in (err, stats)]
    assert kept[0] == kept[1] and len(kept[0]) == 1


def test_whatever_a_plugin_raises_is_a_line(talked, failing, monkeypatch):
    expected, stats = talked([TURNS[0], TURNS[1], "/stats"])
    for error in ANYTHING:
        monkeypatch.setattr(failing, "raises", error)
        out, err = talked([TURNS[0], "/method failing budget=20 window=8", TURNS[1], "/stats"])
        assert (out, err[1:-1]) == (expected, stats[:-1])  # the last line has times in it
        if error in ANYTHING[:2]:  # of memory
            assert err[0].startswith("restkv: error: not enough memory for this prompt and answer under failing")
        else:
            assert err[0].startswith("restkv: error: /method failed (") and "what it was before" in err[0]
        assert all(character.isprintable() for character in err[0])


def test_a_turn_that_fails_is_a_line(talked, failing):
    failing.works = 4  # layers
    method = "budget=20 window=8 interval=4"
    out, err = talked([TURNS[0], f"/method failing {method}", TURNS[1], "/method full", TURNS[2]])
    assert err[1] == "restkv: error: this turn failed (RuntimeError: broken); the conversation is what it was before"
    expected, _ = talked([TURNS[0], "/method full", TURNS[2]])
    assert (out[0], out[-1], len(out)) == (*expected, 3)


def test_a_budget_beyond_all_memory_does_not_end_a_chat(talked):
    out, err = talked([TURNS[0], "/method snapkv budget=2000000000", TURNS[1]])
    assert len(out) == 2 and len(err) == 1


def test_a_template_that_fails_in_the_middle_is_a_line(templated_folder, talked, monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 0.2)
    template = (
        "{% for m in messages %}{% if 'Lily' in m.content %}{{ raise_exception('no\nLily') }}{% endif %}"
        "{% if 'Otto' in m.content %}{% set n = 9 %}{{ n ** (n ** n) }}{% endif %}<{{ m.content }}>{% endfor %}"
    )
    folder = templated_folder(template)
    out, err = talked(["Tom", "Lily", "Otto", "Mia"], folder)
    expected, _ = talked(["Tom", "Mia"], folder)
    assert [line for line in out if line] == expected
    assert [line.rpartition("failed: ")[2].split(";")[0] for line in err] == [
        "no Lily",
        "it needs more than 0.2 s of processor time",
    ]


@pytest.fixture
def templated_folder(rambler, tmp_path):
    def make(template: str) -> Path:
        for file in rambler.iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def test_a_warning_turned_error_is_a_line(talked, monkeypatch):
    def warned(*_: object, **__: object) -> None:
        warnings.warn("be careful", UserWarning, stacklevel=2)

    monkeypatch.setattr(talk.Chat, "change", warned)
    with warnings.catch_warnings(action="error"):
        out, err = talked([TURNS[0], "/method full", TURNS[1]])
    assert len(out) == 2 and err == [
        "restkv: error: /method failed (UserWarning: be careful); the conversation is what it was before"
    ]


def test_remarks_that_nobody_hears_stop_nothing(talked, monkeypatch):
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    out, _ = talked(["/dance", TURNS[0], "/stats", TURNS[1]])
    assert len(out) == 2


def test_a_full_disk_under_the_answers_is_a_line(rambler):
    """In a process of its own, whose stdout cannot be written to until it ends."""
    lines = "Tom\n/stats\nLily\n/stats\n"
    command = [sys.executable, "-m", "restkv", "chat", str(rambler), "-n", "4"]
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(command, input=lines, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    said = ran.stderr.splitlines()
    assert sum("No space left on device" in line for line in said) >= 2
    seen = [int(line.split(" of ")[1].split()[0]) for line in said if ": kept " in line]
    assert len(seen) == 2 and seen[1] > seen[0]


def test_a_process_of_its_own_survives_them_all(rambler, tmp_path):
    """With bytes that are no text among the lines, and a folder that may not be written to."""
    lines = [
        b"Tom",
        *(line.encode() for line in MISTAKES),
        b"\xff\xfe\xf0",
        b"/load \xff\xfe",
        b"/save \xff/\xfe",
        b"/stats",
    ]
    command = [sys.executable, "-m", "restkv", "chat", str(rambler), "-n", "4"]
    ran = subprocess.run(command, input=b"\n".join(lines), capture_output=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr
    assert len(ran.stdout.splitlines()) == 2
    assert b": kept " in ran.stderr and b"\x1b" not in ran.stderr and b"\x07" not in ran.stderr
    assert not list(tmp_path.iterdir())


# -- values of options, on all commands


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=[1,2]", [1, 2]),
        ("a=word", "word"),
        ("a=none", None),
        ("a=null", None),
        ("a=True", True),
        ("a=0:4", "0:4"),
        ("a=b=c", "b=c"),
        ('a="1"', "1"),
        ('a={"b": [{"c": 1}]}', {"b": [{"c": 1}]}),
        (f"a={'9' * 5000}", "9" * 5000),
        (f"a={'[' * 40}{']' * 40}", None),
    ],
)
def test_values_are_json_or_words(text, value):
    name, read = parse_field(text)
    assert name == "a" and (read == value or value is None)


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "[1, -1e999]",
        DEEP,
        '{"a":' * 60 + "1" + "}" * 60,
        "[" * 500 + "]" * 500,
    ],
)
def test_values_that_nothing_takes_are_one_line(value):
    with pytest.raises(PolicyError, match=r"^--set '.*: give a number, a word, or a list") as caught:
        parse_field(f"window={value}")
    assert len(str(caught.value)) < 400


WRONG = [
    "-1",
    "1.5",
    '"x"',
    "[1]",
    "{}",
    "none",
    "true",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "4294967296",
    "[[0,1e9]]",
    "[null]",
]


@pytest.mark.parametrize("method", policies.POLICIES)
def test_no_value_of_an_option_is_more_than_a_line(method):
    """A policy is made, or refused in a line; what it is made of, tensors can be computed with."""
    for option in policies.POLICIES[method].__dataclass_fields__:
        for value in WRONG:
            try:
                policies.get_policy(method, **{"budget": 64, **dict([parse_field(f"{option}={value}")])})
            except RestKVError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "options",
    [{"tau": 10**400}, {"scale": float("inf")}, {"budget": 10**5000}, {"alpha": float("nan")}, {"window": 10**5000}],
)
def test_numbers_beyond_all_use_are_refused_in_python_too(options):
    with pytest.raises(PolicyError) as caught:
        ReSTKV(**{"budget": 64, **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700

"""Chat templates as programs of strangers: what they may take, what they are given, and where they are found."""

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
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from make.places import ROOT
from modeling.errors import RestKVWarning, TokenizerError
from modeling.text import renderer
from modeling.text.renderer import Renderer
from modeling.text.templates import ChatTemplates
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL

HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def folder_with(place: Path, files: dict[str, str | bytes], **config: object) -> Path:
    """recall-mini's tokenizer with other entries in tokenizer_config.json, and other files beside it."""
    (place / "tokenizer.json").write_bytes((RECALL / "tokenizer.json").read_bytes())
    (place / "tokenizer_config.json").write_text(json.dumps(TOKENS | config))
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


@pytest.fixture
def rendered(tmp_path):
    """rendered(template, messages, **variables): what Tokenizer.render gives for a folder with this template."""

    def call(template: str, messages: list = HELLO, **variables: Any) -> str:
        return Tokenizer.from_folder(folder_with(tmp_path, {}, chat_template=template)).render(messages, **variables)

    return call


def child_of(one: Renderer) -> subprocess.Popen[bytes]:
    assert one._child is not None
    return one._child.process


# -- limits


MEMORY = {
    "multiplied": "{{ 'a' * 10 ** 10 }}",
    "multiplied list": "{% set x = [0] * 10 ** 10 %}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "precision": "{{ '%.1000000000f' % 1.5 }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "filter format": "{{ '%9999999999s' | format('a') }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ ('a\n' * 10 ** 5) | indent(10 ** 6) }}",
    "tojson": "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "replace": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', 'a' * 9) %}{% endfor %}",
    "namespace": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "list in a namespace": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "strftime": "{{ strftime_now('%Y' * 10 ** 8) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "translate": "{{ ('a' * 10 ** 5).translate({97: 'b' * 10 ** 5}) }}",
    "an answer of its own": "{{ 'é' * 10 ** 8 }}",
}
TIME = {
    "folded power": "{{ 9 ** (9 ** 9) }}",
    "power": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "continue": "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 30 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 30 }}{% endfor %}",
    "slice": "{{ [1] | slice(10 ** 10, 'x') | list | length }}",
    "join": "{% for i in range(99999) %}{% set x = ('a' * 9999) | join(messages[0].role) %}{% endfor %}",
    "wordwrap": "{{ ('a ' * 10 ** 7) | wordwrap(3) | length }}",
    "lipsum": "{{ lipsum(n=10 ** 9) | length }}",
    "sum": "{{ ([[1]] * 10 ** 5) | sum(start=[]) | length }}",
    "a branch not taken": "{% if not messages %}{{ 9 ** (9 ** 9) }}{% endif %}",
}
LENGTH = {
    "one piece": "{{ 'a' * 10 ** 6 }}",
    "pieces": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "its own text": "a" * 200_000,
}


OFTEN = set(
    "multiplied,percent,str.format,center,tojson,batch,namespace,an answer of its own,folded power,ranges,macro,recursive loop,"
    "sum,pieces,parentheses,lists,filters,if,macro that calls itself,include,a long complaint".split(",")
)


def cases(*kinds: tuple[dict[str, str], str]) -> list:
    """Templates with the words that refuse them; those of OFTEN every time, the others with -m slow."""
    return [
        pytest.param(template, words, id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for templates, words in kinds
        for name, template in templates.items()
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    cases(
        (MEMORY, "it needs more than [0-9.,]+ MB of memory"),
        (TIME, "it needs more than [0-9.,]+ s of processor time"),
        (LENGTH, "it needs more than [0-9.,]+ characters to say what it is given"),
    ),
)
def test_a_template_that_takes_too_much_is_stopped(template, words, rendered, monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 0.2 if template in TIME.values() else 2.0)
    start = time.process_time()
    with pytest.raises(TokenizerError, match=f"the chat template failed: {words}") as caught:
        rendered(template)
    assert "\n" not in str(caught.value) and "--no-chat" in str(caught.value)
    assert time.process_time() - start < 1  # in this process


DEEP = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "not": "{{ " + "not " * 5000 + "1 }}",
    "filters": "{{ 'a'" + " | upper" * 5000 + " }}",
    "attributes": "{{ a" + ".b" * 5000 + " }}",
    "sums": "{{ " + "1 + " * 5000 + "1 }}",
    "if": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "for": "{% for i in [1] %}" * 300 + "{% endfor %}" * 300,
    "elif": "{% if a %}" + "{% elif b %}" * 3000 + "{% endif %}",
    "macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block that shows itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "caller": "{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}",
    "include": "{% include 'other' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends messages %}",
    "loop(loop)": "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}",
    "a long complaint": "{{ raise_exception('no ' * 10 ** 6) }}",
}


@pytest.mark.parametrize(("template", "words"), cases((DEEP, "")))
def test_a_template_that_cannot_be_compiled_or_finished_is_one_line(template, words, rendered):
    with pytest.raises(TokenizerError, match=f"the chat template failed: {words}") as caught:
        rendered(template)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ raise_exception.__closure__ }}",
        "{{ namespace.__init__.__globals__ }}",
    ],
)
def test_a_template_learns_nothing_about_the_program(template, rendered):
    try:
        said = rendered(template)
    except TokenizerError as error:
        assert "unsafe" in str(error) or "has no attribute" in str(error)
    else:
        assert not any(word in said for word in ("class", "module", "built-in", "function"))


def test_the_limits_grow_with_what_is_said(rendered):
    long = "é😀 " * 500_000
    template = (
        "{% for m in messages %}{{ m.content | trim | replace('  ', ' ') }}{{ messages | tojson | length }}{% endfor %}"
    )
    said = rendered(template, [{"role": "user", "content": long}])
    assert said.startswith(long.strip()) and len(said) < len(long) + 20


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


# -- what a template is given


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=PLAIN)
@settings(max_examples=150)
def test_values_arrive_as_they_are(value, shared_tokenizers):
    ours, theirs = shared_tokenizers
    assert ours.render(HELLO, x=value) == theirs.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True, x=value
    )


@pytest.fixture(scope="module")
def shared_tokenizers(tmp_path_factory):
    template = (
        "{{ x }}|{{ x | tojson }}|{{ x is string }}{{ x is mapping }}{{ x is number }}{{ x is none }}{{ x is defined }}"
    )
    folder = folder_with(tmp_path_factory.mktemp("values"), {}, chat_template=template)
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_nothing_in_a_message_is_nothing(tmp_path):
    """As OpenAI's interface has it in a message that calls a tool."""
    template = "{% for m in messages %}{{ m.content }}{{ m.content is defined }}{{ m.tool_calls | tojson }}{% endfor %}"
    folder = folder_with(tmp_path, {}, chat_template=template)
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": None, "n": 1}]}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.from_folder(folder).render(messages) == want


def circle() -> list:
    turning: list = []
    turning.append(turning)
    return turning


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "'x' holds nan; give what JSON can hold"),
        ([float("inf")], "'x' holds inf; give"),
        (object(), "'x' holds a object"),
        (b"bytes", "'x' holds a bytes"),
        ({1: 2}, "'x' has the key 1, which is no text"),
        ({"a": {"b": {None: 2}}}, "'x' has the key None"),
        ({"\ud800": 2}, r"'x' has '\\ud800' at place 0, which is no character"),
        ("ab\udc80", r"'x' has '\\udc80' at place 2, which is no character"),
        (circle(), "'x' is more than 100 lists and objects deep"),
        pytest.param(10**5000, "'x' holds a number of more digits", id="10**5000"),
        pytest.param({10**5000: 1}, "'x' has the key <int>, which is no text", id="{10**5000: 1}"),
        (len, "'x' holds a builtin_function_or_method"),
        ({1, 2}, "'x' holds a set"),
    ],
)
def test_what_no_template_can_be_given_is_refused_by_name(value, words, rendered):
    with pytest.raises(TokenizerError, match=f"^template variable {words}") as caught:
        rendered("{{ x }}", x=value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenizerError, match=f"^chat message 1 {words.removeprefix(chr(39) + 'x' + chr(39) + ' ')}"):
        rendered("{{ messages }}", [*HELLO, {"role": "user", "content": value}])


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "raise_exception", "strftime_now"])
def test_what_a_chat_says_itself_is_no_variable(name, rendered):
    with pytest.raises(TokenizerError, match=f"^template variable '{name}': is what the chat itself says"):
        rendered("{{ x }}", template_args={name: 1})


def test_variables_come_one_way_or_the_other(rendered):
    template = "{{ enable_thinking | default('unset') }}{{ tools }}{{ bos_token }}"
    assert rendered(template, template_args={"enable_thinking": False}) == "FalseNone<s>"
    assert rendered(template, template_args={"enable_thinking": False}, tools=[]) == "False[]<s>"
    assert rendered(template, bos_token="") == "unsetNone"  # as in transformers
    with pytest.raises(TokenizerError, match="'tools': given twice"):
        rendered(template, template_args={"tools": []}, tools=[])
    with pytest.raises(TokenizerError, match="'enable-thinking': is no name of a variable"):
        rendered(template, template_args={"enable-thinking": False})


def test_a_variable_that_no_template_reads_is_remarked_on(tmp_path):
    template = "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{% set own = 1 %}{{ own }}"
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {}, chat_template=template))
    with pytest.warns(RestKVWarning) as told:
        tokenizer.check_template({"enable_thinking": True, "enable_thinkng": True, "own": 2})
    assert [str(one.message).split("'")[1] for one in told] == ["enable_thinkng", "own"]


# -- which template


WHERE = [
    ({}, {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}),
    ({}, {"chat_template": [{"name": "a", "template": "A"}, {"name": "tool_use", "template": "T"}]}),
    ({"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "T"}, {"chat_template": "C"}),
    ({"chat_template.jinja": "F\r\nG\r\n", "additional_chat_templates/x.y.jinja": "X"}, {}),
    ({"additional_chat_templates/a.jinja": "A", "additional_chat_templates/b.jinja": "B"}, {"chat_template": "C"}),
    ({"additional_chat_templates/tool_use.jinja": "T"}, {"chat_template": "C"}),
    ({"additional_chat_templates/readme.txt": "no", "chat_template.jinja": "F"}, {}),
]


@pytest.mark.parametrize(("files", "config"), WHERE)
def test_a_template_is_chosen_as_in_transformers(files, config, tmp_path):
    folder = folder_with(tmp_path, files, **config)
    ours, theirs = Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.has_chat_template
    known = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": theirs.chat_template}
    for name, tools in product((None, "default", "tool_use", "a", "x.y"), (None, [{"name": "f"}])):
        try:
            assert name is None or name in known  # to transformers any other text is a template itself
            want = theirs.apply_chat_template(HELLO, chat_template=name and known[name], tools=tools, tokenize=False)
        except (AssertionError, ValueError):
            with pytest.raises(TokenizerError, match=r"chat templates named .*, and none called .*template_name="):
                ours.render(HELLO, tools=tools, template_name=name)
        else:
            assert ours.render(HELLO, tools=tools, template_name=name) == want


BROKEN: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "no text": ({"chat_template.jinja": b"\xff"}, {}, "chat_template.jinja: unreadable (not UTF-8)"),
    "a pointer": (
        {"chat_template.jinja": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"},
        {},
        "chat_template.jinja: is a Git LFS pointer",
    ),
    "too long": ({"chat_template.jinja": b" " * (2 << 20)}, {}, "more than 1,048,576 characters"),
    "too long in the settings": ({}, {"chat_template": " " * (2 << 20)}, "more than 1,048,576 characters"),
    "a number": ({}, {"chat_template": 3}, "'chat_template' is neither a string nor a list"),
    "an empty list": ({}, {"chat_template": []}, "'chat_template' is neither a string nor a list"),
    "a list of numbers": ({}, {"chat_template": [3]}, "'chat_template' is neither a string nor a list"),
    "nameless": ({}, {"chat_template": [{"template": "a"}]}, "'chat_template' is neither a string nor a list"),
    "named, without default": (
        {},
        {"chat_template": [{"name": n, "template": n} for n in "ab"]},
        "named a, b, and none called",
    ),
    "named, without text": (
        {},
        {"chat_template": [{"name": "a"}, {"name": "default"}]},
        "chat template 'default' is no text",
    ),
    "legacy, no JSON": ({"chat_template.json": b"nope"}, {}, "chat_template.json: not valid JSON"),
    "no syntax": ({"chat_template.jinja": b"{% for %}"}, {}, "the chat template failed: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_stands_in_the_way_of_chats_alone(name, tmp_path):
    files, config, words = BROKEN[name]
    folder = folder_with(tmp_path, files, **config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("Lily") == Tokenizer.from_folder(RECALL).encode("Lily")
    assert tokenizer.has_chat_template
    with pytest.raises(TokenizerError) as caught:
        tokenizer.render(HELLO)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["a folder", "a broken link", "a pipe"])
def test_a_template_that_is_no_file_is_not_passed_over(what, tmp_path):
    place = folder_with(tmp_path, {}) / "chat_template.jinja"
    {"a folder": place.mkdir, "a broken link": lambda: place.symlink_to("nothing"), "a pipe": lambda: os.mkfifo(place)}[
        what
    ]()
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: (is no regular file|unreadable \(No such file)"):
        tokenizer.render(HELLO)


def test_another_template_does_not_suffer(tmp_path):
    files: dict[str, str | bytes] = {"chat_template.jinja": "fine", "additional_chat_templates/bad.jinja": b"\xff"}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, files))
    assert tokenizer.render(HELLO) == "fine"
    with pytest.raises(TokenizerError, match=r"bad\.jinja: unreadable"):
        tokenizer.render(HELLO, template_name="bad")


@pytest.mark.parametrize("messages", [None, 3, "hello", {"role": "user"}, [None], [{"content": 1}], [["role"]]])
def test_what_is_no_conversation_is_one_line(messages, rendered):
    with pytest.raises(TokenizerError, match=r"^chat message"):
        rendered("x", messages)


def test_no_template_at_all():
    assert not ChatTemplates({}, "here") and ChatTemplates({}, "here").default is None
    with pytest.raises(TokenizerError, match="here: has no chat template; pass plain text"):
        ChatTemplates({}, "here").render(HELLO, {}, True, {}, None)

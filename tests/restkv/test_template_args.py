"""Variables of chat templates, such as Qwen3's enable_thinking, from Python, from the command line, and in saved chats."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import restkv
from make.chats import SYSTEM, TURNS, say
from restkv.chat import Chat
from restkv.cli import main
from restkv.errors import PromptError, RestKVWarning, TokenizerError
from restkv.lm import LM
from restkv.policies import FullCache, ReSTKV

# The end of Qwen3's template, and what it does with earlier answers.
THINKING = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
OFF = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def thinker(rambler, tmp_path_factory) -> Path:
    """A folder with that template, and another one by name."""
    folder = Path(shutil.copytree(rambler, tmp_path_factory.mktemp("thinker") / "model"))
    (folder / "chat_template.jinja").write_text(THINKING)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "terse.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
    )
    return folder


@pytest.fixture(scope="module")
def lm(thinker) -> LM:
    return restkv.load(thinker)


def written(chat: Chat) -> str:
    """What the chat's tokens say, with answers blanked out."""
    text = chat.lm.tokenizer.decode(chat.tokens, skip_special=False)
    for message in chat.messages:
        if message["role"] == "assistant":
            text = text.replace(message["content"], "...", 1)
    return text


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_thinking_is_switched_off_in_every_turn(system, lm, tmp_path):
    chat = Chat(lm, FullCache(), system, template_args={"enable_thinking": False})
    thinking = Chat(lm, FullCache(), system)
    for turn in TURNS[:2]:
        say(chat, turn)
        say(thinking, turn)
    assert written(chat).count(f"<|im_start|>assistant\n{OFF}...") == 2
    assert written(thinking) == written(chat).replace(OFF, "")
    chat.save(tmp_path / "chat")
    again = Chat.load(tmp_path / "chat", lm)
    for one in (chat, again):
        say(one, TURNS[2])
    assert written(again) == written(chat) and written(again).count(OFF) == 3
    fresh = again.anew()
    say(fresh, TURNS[0])
    assert written(fresh).count(OFF) == 1


def test_a_template_is_chosen_by_name(lm, tmp_path):
    chat = Chat(lm, ReSTKV(64), template_name="terse", template_args={"mood": {"is": [1, None]}})
    say(chat, "Tom")
    assert written(chat) == "[Tom]{'is': [1, None]}..."
    chat.save(tmp_path / "chat")
    again = Chat.load(tmp_path / "chat", lm)
    say(again, "Lily")
    assert written(again).count("[Lily]{'is': [1, None]}...") == 1


def test_what_is_of_no_use_is_refused_or_remarked_on(lm, rambler):
    useless: list[tuple[dict[str, Any], str]] = [
        ({"template_args": {"x": 1}, "template": False}, "template_args x: this chat uses no chat template"),
        ({"template_name": "terse", "template": False}, "template_name 'terse': this chat uses no chat template"),
    ]
    for options, words in useless:
        with pytest.raises(PromptError, match=words):
            Chat(lm, FullCache(), **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"template_name": "verbose"}, "named default, terse, and none called 'verbose'"),
        ({"template_args": {"messages": []}}, "'messages': is what the chat itself says"),
        ({"template_args": {"enable thinking": 1}}, "is no name of a variable"),
        ({"template_args": {"x": {1, 2}}}, "'x' holds a set"),
        ({"template_args": ["x"]}, r"template variables \['x'\]: give names and values"),
        ({"template_args": "x"}, "template variables 'x': give names and values"),
        ({"template_name": ["terse"]}, r"none called \['terse'\]"),
    ]
    for options, words in wrong:
        with pytest.raises(TokenizerError, match=words):
            Chat(lm, FullCache(), **options)
    with pytest.warns(RestKVWarning, match="reads no variable 'enable_thinkng'"):
        Chat(lm, FullCache(), template_args={"enable_thinkng": False})
    plain = restkv.load(rambler)
    with pytest.raises(
        PromptError, match=r"no chat template; leave out template=True \(--template\), and turns are plain"
    ):
        Chat(plain, FullCache(), template=True)
    with pytest.raises(PromptError, match="template_args enable_thinking: this chat uses no chat template"):
        Chat(plain, FullCache(), template_args={"enable_thinking": False})


# -- the command line


@pytest.fixture
def ran(capsys, monkeypatch):
    """ran(*arguments, stdin=text): exit code, stdout, stderr of one command in this process."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        return main([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


def test_generate_takes_variables_and_names(ran, thinker, lm):
    def tokens(*options: str) -> int:
        code, out, err = ran("generate", thinker, "-p", "Hi", "-n", 1, "--json", *options)
        assert code == 0 and "note" not in err
        return json.loads(out)["stats"]["prompt_tokens"][0]

    chat, user = lm.tokenizer.chat, [{"role": "user", "content": "Hi"}]
    assert tokens() == tokens("--template-arg", "enable_thinking=true") == len(chat(user))
    off = len(chat(user, template_args={"enable_thinking": False}))
    assert off > len(chat(user))
    for value in ("false", "False", "FALSE"):
        assert tokens("--template-arg", f"enable_thinking={value}") == off
    terse = chat(user, template_args={"mood": "gay"}, template_name="terse")
    assert tokens("--template-name", "terse", "--template-arg", "mood=gay") == len(terse)


def test_chat_takes_variables_and_names(ran, thinker, lm, tmp_path):
    place = tmp_path / "talk"
    options = ("-n", 4, "--template-arg", "enable_thinking=false", "--budget", 64)
    code, _, err = ran("chat", thinker, *options, stdin=f"Tom\n/save {place}\nLily\n/new\nTom\n/save {place}2\n")
    assert code == 0 and "error" not in err
    for saved in (place, f"{place}2"):
        assert written(Chat.load(saved, lm)).count(OFF) == 1
    code, _, err = ran("chat", thinker, "--load", place, "--template-arg", "x=1")
    assert code == 2 and "a saved chat has its template and what it is given" in err
    assert ran("chat", thinker, "-n", 2, "--template-name", "terse", stdin="Tom\n")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--template-arg", "messages=[]"), "template variable 'messages': is what the chat itself says"),
        (("--template-arg", "add_generation_prompt=false"), "'add_generation_prompt': is what the chat itself says"),
        (("--template-arg", "enable_thinking"), "--template-arg 'enable_thinking' is not NAME=VALUE"),
        (("--template-arg", "a=1", "--template-arg", "a=2"), "--template-arg a: given twice"),
        (("--template-arg", "a b=1"), "template variable 'a b': is no name"),
        (("--template-arg", "a=NaN"), "--template-arg 'a=NaN': give a number"),
        (("--template-arg", "a=" + "[" * 3000), "--template-arg 'a=[[["),
        (("--template-arg", "a=\ud800"), "--template-arg: not UTF-8 text"),
        (("--template-name", "verbose"), "none called 'verbose'"),
    ],
)
def test_what_no_template_takes_is_one_line(options, words, ran, thinker):
    for command in (("generate", thinker, "-p", "Hi"), ("chat", thinker)):
        code, out, err = ran(*command, *options, stdin="Hi\n")
        lines = [line for line in err.splitlines() if not line.startswith("restkv: note")]
        assert code == 2 and len(lines) == 1 and words in lines[0] and out.strip() == ""


@pytest.mark.parametrize("options", [("--template-arg", "enable_thinking=false"), ("--template-name", "terse")])
def test_options_of_a_template_need_one(options, ran, thinker, rambler):
    for command in (
        ("generate", thinker, "-p", "Hi", "--no-chat"),
        ("generate", rambler, "-p", "Hi"),
        ("chat", thinker, "--no-template"),
        ("chat", rambler),
    ):
        code, out, err = ran(*command, *options, stdin="Hi\n")
        assert (code, out) == (2, "") and "no chat template" in err and len(err.splitlines()) == 1


def test_a_misspelt_variable_is_a_note(ran, thinker):
    for command in (("generate", thinker, "-p", "Hi", "-n", 1), ("chat", thinker, "-n", 1)):
        code, _, err = ran(*command, "--template-arg", "enable_thinkng=false", stdin="Hi\n")
        assert code == 0
        assert [line for line in err.splitlines() if "note" in line] == [
            "restkv: note: the chat template reads no variable 'enable_thinkng', which changes nothing"
        ]


@pytest.mark.parametrize(
    "settings",
    [{"chat_template": [{"name": n, "template": n} for n in "ab"]}, {"chat_template": 3}, {"chat_template": "{% if"}],
)
def test_templates_that_cannot_be_used_block_chats_alone(settings, ran, rambler, tmp_path):
    folder = Path(shutil.copytree(rambler, tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ran("inspect", folder)[0] == 0
    assert ran("generate", folder, "-p", "Hi", "-n", 1, "--no-chat")[0] == 0
    assert ran("chat", folder, "-n", 1, "--no-template", stdin="Hi\n")[0] == 0
    for command in (("generate", folder, "-p", "Hi"), ("generate", folder, "-p", "Hi", "--chat"), ("chat", folder)):
        code, out, err = ran(*command, stdin="Hi\n")
        assert code == 2 or (command[0] == "chat" and out.strip() == "")
        assert (len(err.splitlines()) == 1 and "--no-chat" in err) or "template failed" in err

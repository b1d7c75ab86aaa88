"""Which of a folder's chat templates is used, and what becomes of broken ones."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import transformers

from make.template_folders import HELLO, folder_with
from modeling.errors import TokenizerError
from modeling.text.templates import ChatTemplates
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL

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

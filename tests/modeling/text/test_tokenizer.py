"""Tokenizer: ids and chats as transformers has them, streams that equal the whole, one line for broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from make.effort import many
from make.toy_tokenizers import CORPUS, KINDS, SPECIAL, TOKENS
from modeling.errors import TokenizerError
from modeling.text.tokenizer import Tokenizer

TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "   three",
    "ends in space ",
    "日本語 テスト",
    "a\u0301 combining",
    "<s>marked</s>",
    "😀",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with tokenizer.json and tokenizer_config.json for each kind."""
    made = {}
    for kind, build in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        build().save(str(made[kind] / "tokenizer.json"))
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    return made


def copy(folder: Path, target: Path, **config) -> Path:
    """A copy of a tokenizer folder with other entries in tokenizer_config.json."""
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (target / "tokenizer_config.json").write_text(json.dumps(TOKENS | config))
    return target


def fast(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_those_of_transformers(kind, text, folders):
    ours, theirs = Tokenizer.from_folder(folders[kind]), fast(folders[kind])
    ids = ours.encode(text, bos=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    if not text.startswith("<s>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text())
def test_a_tokenizer_with_bytes_loses_nothing(kind, folders, text):
    for special in SPECIAL:
        text = text.replace(special, "")
    tokenizer = Tokenizer.from_folder(folders[kind])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_those_of_the_files(folders, stories260k):
    tokenizer = Tokenizer.from_folder(folders["byte_level"])
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), len(fast(folders["byte_level"])))
    real = Tokenizer.from_folder(stories260k)
    assert (real.bos_id, real.eos_ids, real.vocab_size) == (1, (2,), 512)
    assert real.encode("Once upon a time") == [1, 403, 407, 261, 378]


def test_token_entries_may_be_objects_or_absent(folders, tmp_path):
    entry = {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}
    tokenizer = Tokenizer.from_folder(copy(folders["byte_level"], tmp_path, eos_token=entry, bos_token=None))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (4,))
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_ids == ()


@pytest.mark.parametrize(("kind", "bos"), [("byte_level", [1]), ("byte_fallback", [1]), ("metaspace", [])])
@pytest.mark.parametrize("flag", [None, True, False])
def test_bos_comes_once_and_as_tokenizer_json_says(kind, bos, flag, folders, tmp_path):
    folder = copy(folders[kind], tmp_path, **({} if flag is None else {"add_bos_token": flag}))
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("hello", bos=False)
    assert plain[0] != 1
    assert tokenizer.encode("hello") == bos + plain == fast(folder)("hello")["input_ids"]
    assert tokenizer.encode("<s>hello").count(1) == 1


def test_no_eos_is_appended_to_a_prompt(folders, tmp_path):
    raw = tokenizers.Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello") == [1, *tokenizer.encode("hello", bos=False)]


def test_truncation_and_padding_of_the_file_do_not_cut_prompts(folders, tmp_path):
    raw = tokenizers.Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=100)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = CORPUS[0]
    assert Tokenizer.from_folder(tmp_path).encode(text) == Tokenizer.from_folder(folders["byte_level"]).encode(text)


# --- streaming


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=many(300, 2))
def test_a_stream_gives_exactly_the_text_of_all_ids(kind, folders, data):
    """Random ids: broken UTF-8, byte tokens in any order, special and unknown tokens, spaces."""
    tokenizer = Tokenizer.from_folder(folders[kind])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(alphabet=st.sampled_from("ab €é😀北 \n"), max_size=20), data=st.data())
@settings(max_examples=many(200, 2))
def test_a_stream_of_text_never_shows_half_a_character(kind, folders, text, data):
    tokenizer = Tokenizer.from_folder(folders[kind])
    pieces = streamed(tokenizer, tokenizer.encode(text), True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_speaks_at_every_word(folders):
    tokenizer = Tokenizer.from_folder(folders["byte_level"])
    ids = tokenizer.encode(CORPUS[0])
    pieces = streamed(tokenizer, ids, True)
    assert sum(bool(piece) for piece in pieces) == len(ids) - 1  # all but BOS


def test_a_flushed_stream_starts_anew(folders):
    tokenizer = Tokenizer.from_folder(folders["byte_fallback"])
    stream = tokenizer.stream()
    for _ in range(2):
        assert "".join([*(stream.push(i) for i in tokenizer.encode("café")), stream.flush()]) == "café"


def test_byte_tokens_wait_until_their_run_is_certain(folders):
    """<E2 82 AC> alone is a euro sign; followed by a stray byte, all four decode to U+FFFD."""
    tokenizer = Tokenizer.from_folder(folders["byte_fallback"])
    euro = [3 + byte for byte in "€".encode()]
    letter = tokenizer.encode("a", bos=False)[-1]
    assert streamed(tokenizer, [*euro, letter], True)[:3] == ["", "", ""]
    assert "".join(streamed(tokenizer, [*euro, letter], True)).startswith("€")
    assert "".join(streamed(tokenizer, [*euro, 3 + 0xFF, letter], True)).startswith("\ufffd" * 4)
    # A special token that is not shown does not end the run.
    assert "".join(streamed(tokenizer, [*euro, 2, 3 + 0xFF, letter], True)).startswith("\ufffd" * 4)


# --- chat templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- if tools is not none %}
{{ tools | tojson(indent=2) }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
  {% if ns.count > 3 %}
      {%- break %}
  {% endif %}
  <{{ message.role }}>{{ message.content | trim | tojson }}</{{ message.role }}>
{% endfor %}
{{- ns.count }}{{ pad_token is defined }}{{ unk_token }}{{ enable_thinking | default('unset') }}"""
GENERATION = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {% generation %}
    {%- set mark = '!' %}
{{ m.content }}{{ mark }}
  {% endgeneration %}
({{ mark }})
{%- else -%}
[{{ m.content }}{{ mark }}]
{%- endif -%}
{%- endfor -%}"""
MACRO = """{% macro show(x) %}
({{ x.content | upper }})
{% endmacro %}
{% for m in messages -%}
{{ show(m) }}{{ strftime_now('%Y') | length }}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS, "generation": GENERATION, "macro": MACRO}
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Héllo 'you'  "},
    {"role": "assistant", "content": "Hi!\nHow?"},
    {"role": "user", "content": "Fine"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_render_and_encode_as_in_transformers(name, prompt, folders, tmp_path):
    folder = copy(folders["byte_level"], tmp_path, chat_template=TEMPLATES[name])
    ours, theirs = Tokenizer.from_folder(folder), fast(folder)
    want = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(CHAT, prompt) == want
    encoded: Any = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)
    assert ours.chat(CHAT, prompt) == encoded["input_ids"]
    if name == "tools":
        more: dict[str, Any] = {"tools": [{"name": "näme", "x": [1, None]}], "enable_thinking": False}
        assert ours.render(CHAT, prompt, **more) == theirs.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=prompt, **more
        )


def test_a_template_that_writes_bos_gets_no_second_one(folders, tmp_path):
    tokenizer = Tokenizer.from_folder(copy(folders["byte_level"], tmp_path, chat_template="{{ bos_token }}x"))
    assert tokenizer.chat([{"role": "user", "content": ""}]).count(1) == 1


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


@pytest.mark.parametrize(
    ("config", "files", "want"),
    [
        ({"chat_template": "inline"}, {}, "inline"),
        ({"chat_template": "inline"}, {"chat_template.jinja": "file"}, "file"),
        ({}, {"chat_template.json": '{"chat_template": "legacy"}'}, "legacy"),
        ({"chat_template": NAMED}, {}, "plain"),
        ({"chat_template": NAMED[:1]}, {}, "tools"),
    ],
)
def test_templates_are_found_where_folders_keep_them(config, files, want, folders, tmp_path):
    folder = copy(folders["byte_level"], tmp_path, **config)
    for name, text in files.items():
        (folder / name).write_text(text)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.render([{"role": "user", "content": ""}]) == want


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ raise_exception('no system\nrole') }}", "the chat template failed: no system role"),
        ("{% for %}", "the chat template failed: "),
        ("{{ messages[9].content.x }}", "the chat template failed: "),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template failed: .*unsafe"),
        ("{{ 1 // 0 }}", "the chat template failed: "),
    ],
)
def test_a_failing_template_is_one_line_and_cannot_escape(template, text, folders, tmp_path):
    tokenizer = Tokenizer.from_folder(copy(folders["byte_level"], tmp_path, chat_template=template))
    with pytest.raises(TokenizerError, match=text) as caught:
        tokenizer.chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


def test_no_template_and_odd_messages_are_refused(folders, tmp_path):
    tokenizer = Tokenizer.from_folder(folders["byte_level"])
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="has no chat template; pass plain text"):
        tokenizer.chat(CHAT)
    tokenizer = Tokenizer.from_folder(copy(folders["byte_level"], tmp_path, chat_template=CHATML))
    with pytest.raises(TokenizerError, match="chat message 1 is 'hello'; it must have a 'role'"):
        odd: list[Any] = [CHAT[0], "hello"]
        tokenizer.chat(odd)


# --- broken files


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.json", None, "no tokenizer.json; make it from the folder's other tokenizer files"),
        ("tokenizer.json", b"{", "tokenizer.json: unreadable"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json: unreadable"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: holds a list"),
    ],
)
def test_a_broken_file_is_named_in_one_line(name, content, text, folders, tmp_path):
    folder = copy(folders["byte_level"], tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=text) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)

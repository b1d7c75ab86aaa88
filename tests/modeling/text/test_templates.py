"""Chat templates as programs of strangers: what they may take, what they are given, and where they are found."""

from __future__ import annotations

import copy
import time

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from make.effort import many
from make.template_folders import HELLO, folder_with
from modeling.errors import RestKVWarning, TokenizerError
from modeling.text import renderer
from modeling.text.templates import REASONING
from modeling.text.tokenizer import Tokenizer

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
@settings(max_examples=many(150, 2))
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


REASONED = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}|"
    "{{ m.thinking }}|{{ m.reasoning }}|{{ m | tojson }}{% endfor %}"
)
SAID = st.none() | st.text(max_size=3) | st.booleans() | st.lists(st.text(max_size=2), max_size=2)


@given(data=st.data())
@settings(max_examples=many(150, 2))
def test_reasoning_has_all_its_names_as_in_transformers(data, reasoned):
    """Whatever names a message has it under, in whatever order, with other keys in between."""
    ours, theirs = reasoned
    messages = []
    for _ in range(data.draw(st.integers(1, 3))):
        names = ["content", *data.draw(st.lists(st.sampled_from([*REASONING, "tool_calls"]), unique=True))]
        said = {name: data.draw(SAID) for name in data.draw(st.permutations(names))}
        messages.append({"role": data.draw(st.sampled_from(["user", "assistant"])), **said})
    before = copy.deepcopy(messages)
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert messages == before


@pytest.mark.parametrize("name", REASONING)
def test_a_template_reads_reasoning_whatever_it_is_called(name, reasoned):
    ours, theirs = reasoned
    messages = [*HELLO, {"role": "assistant", "content": "4", name: "easy"}, *HELLO]
    said = ours.render(messages)
    assert "<think>easy</think>4|easy" in said
    assert said == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.fixture(scope="module")
def reasoned(tmp_path_factory):
    folder = folder_with(tmp_path_factory.mktemp("reasoned"), {}, chat_template=REASONED)
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", ["get_weather", ["get_weather"], {"name": "f"}, [{"name": "f"}, None], 3, True])
def test_tools_and_documents_are_objects_as_in_transformers(name, value, reasoned):
    ours, theirs = reasoned
    with pytest.raises(TokenizerError, match=f"^template variable '{name}' is .*; it must be a list of objects"):
        ours.render(HELLO, template_args={name: value})
    with pytest.raises((ValueError, TypeError)):
        theirs.apply_chat_template(HELLO, tokenize=False, **{name: value})


def test_a_chat_without_a_message_is_refused_as_in_transformers(reasoned):
    ours, theirs = reasoned
    with pytest.raises(TokenizerError, match="a chat without a message cannot be rendered; give at least one"):
        ours.render([])
    with pytest.raises(ValueError, match="empty conversation"):
        theirs.apply_chat_template([], tokenize=False)


@pytest.mark.parametrize("shown", ["m.content", "m.content | trim", "m.content | upper", "m.role", "'x' ~ m.content"])
@pytest.mark.parametrize("content", ["It was", "It was ", " \n It\n", "", " ", "end", "</end>", "user", None, "is: "])
def test_a_message_is_gone_on_with_as_in_transformers(shown, content, tmp_path):
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {shown} }}}}</end>\n{{% endfor %}}"
    folder = folder_with(tmp_path, {}, chat_template=template)
    messages = [*HELLO, {"role": "assistant", "content": content}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    except ValueError:
        with pytest.raises(TokenizerError, match=r"last (chat )?message"):
            Tokenizer.from_folder(folder).render_open(messages)
    else:
        assert Tokenizer.from_folder(folder).render_open(messages) == want


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

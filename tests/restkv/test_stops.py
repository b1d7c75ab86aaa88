"""Stop strings: found among special tokens as well as in text; and text of half characters, which comes in linear time."""

from __future__ import annotations

import re
import time

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

import restkv
from make.effort import many
from make.toy_tokenizers import KINDS, TOKENS
from modeling.text.tokenizer import Tokenizer
from restkv import Chat, FullCache
from restkv.cli.options import RECALL
from restkv.results import Decoding, Row
from restkv.session import Session

START = 3  # id of <|im_start|>


@pytest.fixture(scope="session")
def words() -> dict[str, Tokenizer]:
    return {kind: Tokenizer(build(), TOKENS, None, kind) for kind, build in KINDS.items()}


ALPHABET = sorted((token, text) for text, token in KINDS["byte_level"]().get_vocab().items())


def answer(tokenizer: Tokenizer, ids: list[int], stop, eos=(2,), ignore_eos=False) -> tuple[Row, list[str]]:
    row, pieces = Row(tokenizer, Decoding(len(ids), stop=stop, ignore_eos=ignore_eos), eos), []
    for token in ids:
        pieces.append(row.push(token))
        if row.reason:
            break
    return row, pieces


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_is_a_stop_string(kind, words):
    tokenizer = words[kind]
    im_end = tokenizer.encode("<|im_end|>", bos=False)[-1]
    ids = [*tokenizer.encode("Lily loved", bos=False), im_end, *tokenizer.encode("the park", bos=False)]
    row, pieces = answer(tokenizer, ids, "<|im_end|>")
    assert (row.text, row.reason, row.tokens[-1]) == ("Lily loved", "stop", im_end)
    assert "".join(pieces) == row.text and pieces[0]
    # Without the stop the token is not shown.
    row, _ = answer(tokenizer, ids, ())
    assert row.reason == "length" and row.text == tokenizer.decode(ids)


# text of the answer with special tokens, stop strings -> text shown, reason
CASES = [
    ("ab<|im_end|>cd", "<|im_end|>", "ab", "stop"),
    ("ab<|im_end|>cd", "b<|im_end|>c", "a", "stop"),  # spans text and a special token
    ("ab<|im_end|><|im_start|>cd", "<|im_end|><|im_start|>", "ab", "stop"),
    ("ab<|im_end|>cd", "im_end", "ab", "stop"),  # within its spelling
    ("ab<|im_end|>cd", "|>c", "ab", "stop"),
    ("ab<|im_end|>cd", "<|im_end|>x", "abcd", "length"),  # begins, but does not come
    ("ab<|im_start|>cd", "<|im_end|>", "abcd", "length"),  # two specials begin alike
    ("ab<|im_end|>cd", "bc", "a", "stop"),  # in the text that is shown
    ("ab<|im_end|>cd", ["cd", "<|im_end|>"], "ab", "stop"),
    ("ab<|im_end|>cd", ["b", "<|im_end|>"], "a", "stop"),
    ("ab<|im_end|>cd", "d", "ab", "stop"),  # the token is spelled with one
    ("ab<|im_end|>cxy", "x", "abc", "stop"),
    ("<|im_end|>cd", "<|im_end|>", "", "stop"),
    ("ab<|im_end|>", "b<|im_end|>", "a", "stop"),  # the last token there may be
    ("ab</s>cd", "</s>", "ab", "eos"),  # EOS ends it by itself
    ("ab</s>cd", "b</s>", "a", "stop"),
    ("ab</s>cd", "x</s>", "ab", "eos"),
    ("é<|im_end|>cd", "é<|im", "", "stop"),
]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize(("said", "stop", "text", "reason"), CASES)
def test_stops_are_found_in_the_text_with_special_tokens(kind, said, stop, text, reason, words):
    tokenizer = words[kind]
    parts = re.split(r"(<[^>]+>)", said)
    ids = [token for part in parts if part for token in tokenizer.encode_more(part)]  # no space before any of them
    assert tokenizer.decode(ids, skip_special=False) == said
    row, pieces = answer(tokenizer, ids, stop)
    assert (row.text, row.reason) == (text, reason)
    assert "".join(pieces) == text


def test_eos_is_a_special_token_like_any_other_where_it_is_ignored(words):
    ids = words["byte_level"].encode("ab</s>cd", bos=False)
    assert answer(words["byte_level"], ids, "</s>", ignore_eos=True)[0].reason == "stop"
    assert answer(words["byte_level"], ids, (), ignore_eos=True)[0].text == "abcd"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(data=st.data())
@settings(max_examples=many(150, 2))
def test_a_stop_ends_any_answer_before_it_and_nothing_is_taken_back(kind, words, data):
    """Random tokens, also halves of characters: what was said of the whole text holds for the pieces."""
    tokenizer = words[kind]
    pool = [*range(2, 5), *tokenizer.encode("ab Lily €😀", bos=False), *range(10, 14)]
    ids = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=14))
    whole = tokenizer.decode(ids, skip_special=False)
    at, to = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    stops = [whole[at:to] or "Q", data.draw(st.sampled_from(["Q", "Lily", "<|im_end|>a", "b<"]))]
    row, pieces = answer(tokenizer, ids, stops, eos=())
    assert "".join(pieces) == row.text
    said = tokenizer.decode(row.tokens, skip_special=False)
    hits = [stop for stop in stops if stop in said or stop in tokenizer.decode(row.tokens)]
    assert (row.reason == "stop") == bool(hits)
    assert not any(stop in row.text for stop in stops)
    if not hits:
        assert row.text == tokenizer.decode(row.tokens)
    elif "\ufffd" not in said:  # else a special token within a character: the two texts differ by more than itself
        assert row.text == tokenizer.decode(row.tokens)[: shown_before_stops(tokenizer, row.tokens, stops)]


def shown_before_stops(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> int:
    """How many characters of the shown text come before the first of the stops that there are."""
    full, shown = ([tokenizer.decode(ids[:n], skip) for n in range(len(ids) + 1)] for skip in (False, True))
    places = [shown[-1].find(stop) for stop in stops if stop in shown[-1]]
    for begin in (full[-1].find(stop) for stop in stops if stop in full[-1]):
        before = max(n for n, text in enumerate(full) if len(text) <= begin and full[-1].startswith(text))
        within = 0 if tokenizer.spelling(ids[before]) is None else begin - len(full[before])
        places.append(len(shown[before]) + within)
    return min(places)


# -- everywhere that answers are made


@pytest.fixture
def says(monkeypatch):
    """recall-mini, which says "Red <BOS> blue." and then goes on, whatever it is asked; and how BOS is spelled."""
    lm = restkv.load(RECALL)
    bos, words = lm.tokenizer.bos_id, lm.tokenizer
    script = [*words.encode("Red", bos=False), bos, *words.encode(" blue. And so on, and on, and on.", bos=False)]

    def sample(self, *_):
        self.said = getattr(self, "said", -1) + 1
        self.drawn_B = torch.full((len(self.active),), script[self.said % len(script)])
        return self.drawn_B

    monkeypatch.setattr(Session, "sample", sample)
    return lm, words.special_tokens["bos_token"]


def test_stops_among_tokens_end_answers_of_every_kind(says):
    lm, mark = says
    options = {"max_new_tokens": 9, "stop": mark}
    answers = [
        lm.generate("x", FullCache(), **options),
        *lm.generate(["x", "y z"], FullCache(), **options),
        lm.compress("some context", FullCache()).ask("x", **options),
    ]
    stream = lm.stream("x", FullCache(), **options)
    assert "".join(stream) == "Red"
    chat = Chat(lm, FullCache(), template=False)
    said = chat.send("hello", **options)
    assert "".join(said) == "Red" and chat.messages[-1]["content"] == "Red"
    for one in [*answers, stream.generation, said.generation]:
        assert (one.text, one.finish_reason) == ("Red", "stop")
    assert lm.generate("x", FullCache(), max_new_tokens=9).text.startswith("Red blue.")
    assert lm.generate("x", FullCache(), max_new_tokens=9, stop=f"d{mark} b").text == "Re"


def test_lm_evals_until_finds_special_tokens(says):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from bench.harness import RestKVHarness

    _, mark = says
    harness = RestKVHarness(str(RECALL))
    ask = Instance("generate_until", {}, ("x", {"until": [mark], "max_gen_toks": 9}), 0)
    assert harness.generate_until([ask], disable_tqdm=True) == ["Red"]


# -- half characters

HALVES = {
    "byte_level": lambda tokenizer: [tokenizer.encode("€", bos=False)[0]],  # the first of three bytes
    "byte_level continued": lambda tokenizer: [tokenizer.encode("€", bos=False)[-1]],
    "byte_fallback": lambda _: [3 + 0xE2],
    "byte_fallback continued": lambda _: [3 + 0x82],
    "byte_fallback two": lambda _: [3 + 0xE2, 3 + 0x41],
}


@pytest.mark.parametrize("name", HALVES)
def test_half_characters_come_at_once_and_in_linear_time(name, words):
    tokenizer = words[name.split()[0]]
    ids = (HALVES[name](tokenizer) * 5000)[:5000]
    stream, pieces = tokenizer.stream(), []
    begun = time.thread_time()
    for token in ids:
        pieces.append(stream.push(token))
    spent = time.thread_time() - begun
    behind = 5000 - sum(map(len, pieces))
    assert behind <= 4  # of a character that could still come
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    assert spent < 2  # 0.2 s; 60 s when all text is decoded anew at every token


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(data=st.data())
@settings(max_examples=many(200, 2))
def test_streams_of_bytes_equal_the_whole(kind, words, data):
    """Mostly bytes, in any order and any state of a character."""
    tokenizer = words[kind]
    if kind == "byte_fallback":
        byte = st.integers(0x70, 0xFF).map(lambda byte: 3 + byte)
    else:
        letters = [token for token, text in ALPHABET if len(text) == 1]
        byte = st.sampled_from(letters[-140:])
    more = st.sampled_from([2, START, *tokenizer.encode("a b😀", bos=False)])
    ids = data.draw(st.lists(byte | byte | byte | more, max_size=60))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip)
    pieces = [stream.push(token) for token in ids]
    said, behind = "".join(pieces), stream.flush()
    assert said + behind == tokenizer.decode(ids, skip)
    if kind == "byte_level":
        assert len(behind) <= 1


def test_the_rest_of_a_broken_run_comes_byte_by_byte(words):
    stream = words["byte_fallback"].stream()
    assert [stream.push(3 + byte) for byte in (0xE2, 0x82, 0xAC, 0xFF, 0x41)] == ["", "", "", "\ufffd" * 4, "\ufffd"]


def test_byte_tokens_without_a_decoder_of_bytes_are_text():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<0x41>": 0, "b": 1}, unk_token="b"))
    stream = Tokenizer(made, {}, None, "test").stream()
    assert [stream.push(0), stream.push(0)] == ["<0x41>", " <0x41>"]


LATE = {
    "one character late": [decoders.Fuse(), decoders.Replace("xy", "z")],
    "all at the end": [decoders.Fuse(), decoders.Replace(tokenizers.Regex("x+"), "z")],
}


@pytest.mark.parametrize("rules", LATE.values(), ids=LATE)
@given(data=st.data())
@settings(max_examples=many(150, 2))
def test_stops_cut_text_that_comes_late_where_they_cut_any_other(rules, data):
    """Decoders that look across tokens, on texts that they change nothing in, against one that does not."""

    def made(rules: list) -> Tokenizer:
        one = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "ab": 2, "c": 3}, unk_token="a"))
        one.add_special_tokens(["<e>", "<c>"])
        one.decoder = decoders.Sequence(rules)
        return Tokenizer(one, {}, None, "test")

    late, usual = made(rules), made([decoders.Fuse()])
    assert usual.outlook.piecewise and not late.outlook.piecewise
    ids = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    stops = data.draw(st.lists(st.text("abce<>", min_size=1, max_size=4), min_size=1, max_size=1))
    said = []
    for tokenizer in (late, usual):
        options = Decoding(len(ids), stop=stops)
        row = Row(tokenizer, options, (5,))
        pieces = []
        for token in ids:
            pieces.append(row.push(token))
            if row.reason:
                break
        assert "".join(pieces) == row.text
        said.append(row.text)
    assert said[0] == said[1]

"""Streams of decoders that look across tokens: every kind of rule of the tokenizers library, alone and in any chain."""

from __future__ import annotations

import math

import pytest
import tokenizers
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from make.effort import many
from make.toy_tokenizers import KINDS
from modeling.errors import TokenizerError
from modeling.text.outlook import outlook
from modeling.text.tokenizer import Tokenizer

SPELLINGS = [
    *(
        "a",
        "b",
        "ab",
        "ba",
        "aab",
        " ",
        "  ",
        "▁",
        "▁a",
        "▁▁b",
        "##b",
        "b</w>",
        "a</w>b",
        ".",
        " .",
        "n't",
        "\ufffd",
        "ä",
        "Ã",
        "Ġa",
    ),
    *("<0xE2>", "<0x82>", "<0xac>", "<0x41>", "<0x+A>", "<0x 4>", "<0xE>", "<s>", ""),
]
PIECES = st.sampled_from(["a", "b", "ab", " ", "▁", "\ufffd", "<", "0xE2>", "ba", "aa", ""])
REPLACE = st.builds(
    decoders.Replace, PIECES | st.builds(tokenizers.Regex, st.sampled_from(["a+b", "a|$", "^b"])), PIECES
)
STRIP = st.builds(decoders.Strip, st.sampled_from("ab \ufffd"), st.integers(0, 2), st.integers(0, 2))
RULE = st.one_of(
    REPLACE,
    REPLACE,
    STRIP,
    st.builds(decoders.Fuse),
    st.builds(decoders.Fuse),
    st.builds(decoders.ByteFallback),
    st.builds(decoders.ByteLevel),
    st.builds(decoders.WordPiece, st.sampled_from(["##", ""]), st.booleans()),
    st.builds(decoders.Metaspace, prepend_scheme=st.sampled_from(["always", "never", "first"])),
    st.builds(decoders.BPEDecoder, st.sampled_from(["</w>", "b", ""])),
    st.builds(decoders.CTC, st.sampled_from(["a", "<s>"]), st.sampled_from([" ", "▁"]), st.booleans()),
)


def words(decoder: decoders.Decoder | None, spellings: list[str] = SPELLINGS) -> Tokenizer:
    """A tokenizer of these tokens, with two special ones behind them."""
    made = tokenizers.Tokenizer(models.WordLevel({text: i for i, text in enumerate(spellings)}, unk_token="a"))
    made.add_special_tokens(["<|end|>", "<0x43>"])
    if decoder is not None:
        made.decoder = decoder
    return Tokenizer(made, {}, None, "test")


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(token) for token in ids), stream.flush()]


def require_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """The stream's pieces are the whole, which the library may fail on (a Strip of more than there is)."""
    try:
        whole = tokenizer.decode(ids, skip)
    except TokenizerError:
        with pytest.raises(TokenizerError):
            pieces(tokenizer, ids, skip)
        return
    assert "".join(pieces(tokenizer, ids, skip)) == whole


@given(data=st.data())
@settings(max_examples=many(1500, 2))
def test_the_stream_of_any_chain_of_rules_is_the_whole(data):
    rules = data.draw(st.lists(RULE, max_size=4))
    spellings = SPELLINGS if data.draw(st.booleans()) else SPELLINGS[:-1]  # without "" some more are piecewise
    tokenizer = words(decoders.Sequence(rules) if rules else None, spellings)
    event(f"{tokenizer.outlook.piecewise=} {math.isfinite(tokenizer.outlook.unsettled)=}")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12))
    require_whole(tokenizer, ids, data.draw(st.booleans()))


USUAL = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "Llama 2": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "Gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "T5": decoders.Metaspace(),
    "BERT": decoders.WordPiece(),
    "GPT": decoders.BPEDecoder(),
    "wav2vec": decoders.CTC(),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_decoders_are_read_piece_by_piece(name):
    tokenizer = words(USUAL[name], [text for text in SPELLINGS if text and text != "a</w>b"])
    assert tokenizer.outlook.piecewise
    assert (
        all(pieces(tokenizer, tokenizer.encode("ab", bos=False) * 9)[:9]) or name == "wav2vec"
    )  # which drops repetitions


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_as_checkpoints_have_them_are_read_piece_by_piece(kind):
    assert outlook(KINDS[kind]()).piecewise


@pytest.mark.parametrize(
    ("rules", "unsettled"),
    [
        ([decoders.Fuse(), decoders.Replace("ab", "X")], 1),
        ([decoders.Fuse(), decoders.Replace("ab", "XYZ"), decoders.Replace("ZXY", "")], 5),
        ([decoders.Fuse(), decoders.Strip(" ", 2, 0)], 2),
        ([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)], 1),
        ([decoders.ByteLevel(), decoders.Replace("a", "b")], 1),
        ([decoders.ByteFallback(), decoders.Metaspace()], 0),
        ([decoders.Fuse(), decoders.Replace(tokenizers.Regex("a+"), "a")], math.inf),
        ([decoders.Fuse(), decoders.ByteLevel()], math.inf),
        ([decoders.Fuse(), decoders.ByteFallback()], math.inf),
        ([decoders.Metaspace(), decoders.ByteFallback()], math.inf),
        ([decoders.BPEDecoder(), decoders.Fuse()], math.inf),
        ([decoders.Fuse(), decoders.WordPiece()], math.inf),
    ],
)
def test_decoders_that_look_further_hold_back_what_may_change(rules, unsettled):
    tokenizer = words(decoders.Sequence(rules))
    assert (tokenizer.outlook.piecewise, tokenizer.outlook.unsettled) == (False, unsettled)
    given = pieces(tokenizer, [0] * 20)
    whole = tokenizer.decode([0] * 20)
    assert len(given[-1]) == min(unsettled, len(whole)) and "".join(given) == whole


def test_a_pattern_across_tokens_is_replaced_in_a_stream():
    tokenizer = words(decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]))
    assert pieces(tokenizer, [0, 1, 0, 0, 1]) == ["", "", "X", "a", "", "X"]


def test_a_bpe_suffix_within_a_token_waits():
    ids = [SPELLINGS.index("a</w>b"), 0]
    assert pieces(words(decoders.BPEDecoder()), ids) == ["", "", "a ba"]

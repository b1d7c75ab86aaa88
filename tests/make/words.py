"""Tokenizers that are as good as none: one token a word and a mark, for tests that must not depend on a checkpoint."""

from __future__ import annotations

import re
from itertools import islice
from random import Random
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from bench.quality.prose import ADJECTIVES, NOUNS, PADS, sentences
from modeling.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(chat: bool = False) -> Tokenizer:
    """Words of the prose are tokens, everything else is spelled by letters; <s> comes before a prompt."""
    text = " ".join([*NOUNS, *ADJECTIVES, *PADS, *islice(sentences(Random(0)), 2000)])
    words = sorted(set(re.findall(r"[A-Za-z]+", text)))
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<s>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in words)]
    vocabulary = [(piece, -float(len(piece) < 3)) for piece in dict.fromkeys(pieces)]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(made, settings, TEMPLATE if chat else None, "test")

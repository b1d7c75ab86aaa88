"""How far the decoder of a tokenizer looks: which part of a text may still change when more token ids come.

A decoder is a list of rules. Each makes a new list of texts of the tokens' spellings, or of what the rule before it made, and the
last list is joined. Most rules look at one token, some at whether it is the first or the last or repeats the one before; behind
Fuse and ByteLevel, which join everything, a rule sees the whole text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from modeling.text.file import rules_of

LETTERS_OF_BYTES = frozenset("<>x+0123456789abcdefABCDEF")  # byte tokens, <0x0A>, are spelled with these
UNSURE = "\ufffd"  # what bytes decode to that are no character, or not yet
ALONE = ("ByteLevel", "WordPiece", "Metaspace", "CTC")  # look no further back than a token, or a character's bytes
BY_TOKEN = ("Replace", "Strip")  # look at each token by itself, before they are joined
GROWING = (*BY_TOKEN, "WordPiece", "Metaspace", "CTC")  # make a list that only grows when there are more tokens
# Replacements of single characters, byte tokens, Fuse and one character off the start: as in SentencePiece's tokenizers.
SENTENCEPIECE = re.compile("r*b?r*(f+s?)?")


@dataclass(frozen=True)
class Outlook:
    """What a stream may rely on.

    Attributes:
        piecewise: new tokens add the same text behind the last few tokens as behind all.
        unsettled: characters at the end of a text that more tokens may change, unless it ends in SentencePiece's byte tokens,
            which may all change; infinite where nothing can be said.
    """

    piecewise: bool
    unsettled: float


def outlook(tokenizer: tokenizers.Tokenizer) -> Outlook:
    """The outlook of a tokenizer's decoder; of rules that we do not know nothing is said."""
    rules = rules_of(tokenizer.decoder)
    return Outlook(_piecewise(rules, tokenizer), _unsettled(rules))


def _piecewise(rules: Sequence[Mapping[str, Any]], tokenizer: tokenizers.Tokenizer) -> bool:
    kinds = [rule["type"] for rule in rules]
    if all(kind in BY_TOKEN for kind in kinds):  # or there is no rule: the spellings are joined by spaces
        return True
    if len(rules) == 1 and kinds[0] in ALONE:
        return True
    if kinds == ["BPEDecoder"]:  # the suffix becomes a space, and nothing at the end of the last token
        suffix = rules[0]["suffix"]
        return bool(suffix) and not any(
            suffix in text.removesuffix(suffix) for text in tokenizer.get_vocab(with_added_tokens=True)
        )
    if not SENTENCEPIECE.fullmatch("".join(map(_letter, rules))):
        return False
    # Of some tokens behind others, only the first may lose a character: it must have one.
    return kinds[-1] != "Strip" or tokenizer.token_to_id("") is None


def _letter(rule: Mapping[str, Any]) -> str:
    """A rule's letter in SENTENCEPIECE; "?" for one that may not be there."""
    if rule["type"] == "Replace":
        return "r" if _leaves_bytes(rule) else "?"
    if rule["type"] == "Strip":
        return "s" if rule["start"] <= 1 and rule["stop"] == 0 and rule["content"] != UNSURE else "?"
    return {"ByteFallback": "b", "Fuse": "f"}.get(rule["type"], "?")


def _leaves_bytes(rule: Mapping[str, Any]) -> bool:
    """Whether a rule replaces one character by others and cannot make, change or remove a byte token."""
    pattern = rule.get("pattern", {}).get("String", "")
    if rule["type"] != "Replace" or len(pattern) != 1 or not rule["content"]:
        return False
    return not (LETTERS_OF_BYTES | {UNSURE}) & {pattern, *rule["content"]}


def _unsettled(rules: Sequence[Mapping[str, Any]]) -> float:
    joined, end = False, 0.0
    for number, rule in enumerate(rules):
        kind = rule["type"]
        if joined:
            end = _behind(rule, end)
        elif kind in ("Fuse", "ByteLevel"):
            joined, end = True, end + (kind == "ByteLevel")  # the U+FFFD of a character that has begun
        elif kind == "ByteFallback":
            end = end if all(map(_leaves_bytes, rules[:number])) else math.inf
        elif kind not in GROWING:  # BPEDecoder writes the last token otherwise
            end = math.inf
    return end


def _behind(rule: Mapping[str, Any], end: float) -> float:
    """What is unsettled of a whole text behind a rule, if so many characters are before it."""
    kind = rule["type"]
    if kind in ("Fuse", "Metaspace"):  # nothing, or one character by another or none
        return end
    if kind == "Strip":
        return end + rule["start"] + rule["stop"]
    pattern = rule["pattern"].get("String", "") if kind == "Replace" else ""
    if not pattern:  # a regular expression may look at everything
        return math.inf
    # What begins so near the end that its last character is not certain may be replaced or not.
    return (end + len(pattern) - 1) * max(1, len(rule["content"]))

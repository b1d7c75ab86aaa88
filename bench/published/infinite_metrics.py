"""InfiniteBench's own scorers, as its repository has them and as the ReST-KV paper's copy has them (docs/sources.md §4.4).

A label that is a list of one is that one; the choice tasks' labels are (text of the right option, its letter). All from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WORD_MARKS = ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")
CHOICE_MARKS = tuple(mark for mark in WORD_MARKS if mark != ":")
RUN_MARKS = ("\n", ".", "`", "'", '"', ":")
DEBUG_MARKS = ("\n", "`", "'", '"', "-", "*", "Option", "option")
CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")
Labels = Sequence[Any]


def first_integer(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """Whether the first run of the digits 0 to 9 is the label, leading zeros and all."""
    said = re.search("[0-9]+", prediction)
    return float(said is not None and said[0] == labels[0])


def value_among_words(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    return float(labels[0] in _blank(prediction, WORD_MARKS).split())


def value_among_words_paper(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """Also blanks an end-of-sequence mark and the letters of "The" and "To", wherever they stand."""
    return float(labels[0] in _blank(prediction, (*WORD_MARKS, "</s>", "The", "To")).split())


def name_found(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """Whether any label occurs in the prediction, whatever the case of either."""
    return float(any(label.upper() in prediction.upper() for label in labels))


def name_among_words(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """The paper's copy: whether the first label, as it is spelled, is one of the prediction's words in capitals."""
    return float(labels[0] in _blank(prediction, WORD_MARKS).upper().split())


def last_integer(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """Whether the last word is the label as an integer."""
    words = _blank(prediction.strip(), RUN_MARKS).split()
    try:
        return float(bool(words) and int(words[-1]) == labels[0])
    except ValueError:
        return 0.0


def first_number(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """Whether the first number is the label. A fraction where the label is an integer (there an exception) is wrong."""
    said = re.search(r"\d+\.\d+|\d+", prediction)
    if said is None or (isinstance(labels[0], int) and "." in said[0]):
        return 0.0
    return float(float(said[0]) == labels[0])


def first_number_paper(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """A fraction is cut down to an integer where the label is one."""
    said = re.search(r"\d+\.\d+|\d+", prediction)
    if said is None:
        return 0.0
    value = float(said[0])
    return float((int(value) if isinstance(labels[0], int) else value) == labels[0])


def matching_prefix(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """`matching_prefix_paper`, but a list in a list is that list."""
    return matching_prefix_paper(prediction, labels[0] if isinstance(labels[0], list) else labels)


def matching_prefix_paper(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """How many of the label's numbers the prediction's numbers (without signs) begin with, over how many there are."""
    said = [int(digits) for digits in re.findall("[0-9]+", prediction)]
    count = 0
    while count < min(len(said), len(labels)) and said[count] == labels[count]:
        count += 1
    return count / len(labels)


def choice(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """The repository's rule for longbook_choice_eng: the last letter A to D that stands alone, else as `choice_paper`."""
    letter = _last_letter(prediction.strip(), "A-D")
    return 1.0 if letter in labels else choice_paper(prediction, labels)


def choice_paper(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """First letter, else the whole text, else what follows a phrase such as "answer is:", else the first lone letter.

    Lone means: a word that is part of the text "ABCD", so that AB counts, as a wrong one.
    """
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in labels)
    if text in labels:
        return 1.0
    text = _squeeze(_blank(text, CHOICE_MARKS))
    after = _after_prefix(text, CHOICE_PREFIXES)
    if after is not None:
        return float(any(after.startswith(label) for label in labels))
    lone = next((word for word in text.split() if word in "ABCD"), None)
    return float(lone is not None and lone in labels)


def debug(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """The repository's rule for code_debug: last lone letter A to J, else how the text begins, else after a phrase."""
    name, letter = labels
    text = prediction.strip()
    if _last_letter(text, "A-J") == letter:
        return 1.0
    text = _squeeze(_blank(text, DEBUG_MARKS))
    if text.startswith((letter, name)):
        return 1.0
    after = _after_prefix(text, DEBUG_PREFIXES)
    return float(after is not None and after.startswith((letter, name)))


def debug_paper(prediction: str, labels: Labels, classes: Sequence[str] = ()) -> float:
    """The paper's copy: the letter with a full stop, colon, space or line break at the very beginning, else after a phrase."""
    name, letter = labels
    text = prediction.strip()
    if text[:2] in {letter + mark for mark in ".: \n"}:
        return 1.0
    after = _after_prefix(_squeeze(_blank(text, DEBUG_MARKS)), DEBUG_PREFIXES[:3])
    return float(after is not None and after.startswith((letter, name)))


def _last_letter(text: str, letters: str) -> str | None:
    """A lone letter after which none comes on its line; the first such of several lines."""
    found = re.search(rf"\b[{letters}]\b(?!.*\b[{letters}]\b)", text)
    return found and found[0]


def _after_prefix(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the phrases that occurs, and one letter more; None where none occurs."""
    for prefix in prefixes:
        at = text.find(prefix)
        if at >= 0:
            return text[at + len(prefix) + 1 :]
    return None


def _blank(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _squeeze(text: str) -> str:
    return re.sub(" +", " ", text)

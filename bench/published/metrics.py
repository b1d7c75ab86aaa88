"""The metrics of the published benchmarks, with the quirks of the released scorers (docs/sources.md §4), each from 0 to 1.

Only ROUGE for InfiniteBench's summaries and the needle comes from a library (rouge-score, extra `eval`), because that is what
they are defined by. LongBench's ROUGE-L is the package `rouge` 1.0.1, rebuilt here, since its recursion gives up on long
sentences; LongBench's edit similarity is difflib's, which fuzzywuzzy uses where python-Levenshtein is absent, as it is from the
benchmark's requirements.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from restkv.errors import PromptError

Metric = Callable[[str, Sequence[Any], Sequence[str]], float]  # (prediction, answers, classes)

# What InfiniteBench strips from Chinese besides ASCII punctuation, as ranges of code points; the full-width full stop U+FF0E and
# the angle brackets U+3008 to U+300A are not among it.
CHINESE_PUNCTUATION = frozenset(
    chr(code)
    for first, last in (
        (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
        (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
        (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
    )
    for code in range(first, last + 1)
)  # fmt: skip
ASCII_PUNCTUATION = frozenset(string.punctuation)


# -- questions and answers


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of two bags of words, without case, ASCII punctuation and articles."""
    return _bag_f1(_english(prediction).split(), _english(answer).split())


def character_f1(prediction: str, answer: str) -> float:
    """F1 of two bags of characters, without case, punctuation and white space (InfiniteBench's Chinese questions)."""
    return _bag_f1(list(_chinese(prediction)), list(_chinese(answer)))


def _english(text: str) -> str:
    bare = "".join(letter for letter in text.lower() if letter not in ASCII_PUNCTUATION)
    return re.sub(r"\b(?:a|an|the)\b", " ", bare)


def _chinese(text: str) -> str:
    dropped = ASCII_PUNCTUATION | CHINESE_PUNCTUATION
    return "".join("".join(letter for letter in text.lower() if letter not in dropped).split())


def _bag_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


# -- LongBench


def rouge_l(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L F1 as the package `rouge` 1.0.1 computes it: sentences end at full stops; the union over all
    sentence pairs of their longest common subsequences, and all counts, are those of SETS of words.

    Text after a full stop that is only white space counts as a sentence of one empty word. Where the package runs out of
    recursion (two sentences of some 900 words together) the released scorer gives 0, and this the value.
    """
    ours, theirs = _sentences(prediction), _sentences(answer)
    if not ours or not theirs:
        return 0.0
    common: set[str] = set()
    for reference in theirs:
        for sentence in ours:
            common |= _common_subsequence(reference, sentence)
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [piece.split() or [""] for piece in text.split(".") if piece]


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence; of several, the one that is found by walking back along `right` on ties."""
    table = [[0] * (len(right) + 1)]
    for word in left:
        above, row = table[-1], [0]
        for j, other in enumerate(right, 1):
            row.append(above[j - 1] + 1 if word == other else max(above[j], row[j - 1]))
        table.append(row)
    i, j, words = len(left), len(right), set()
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (class names found in the prediction), if the right one is among them.

    Names that are part of the right one are dropped first. The released loop drops from the list it walks along, so that the
    name after a dropped one is skipped; so does this.
    """
    found = [name for name in classes if name in prediction]
    at = 0
    while at < len(found):
        if found[at] in answer and found[at] != answer:
            found.remove(found[at])
        at += 1
    return 1 / len(found) if answer in found else 0.0


def number_share(prediction: str, number: str) -> float:
    """How many of the integers in the prediction are the right one."""
    said = re.findall(r"\d+", prediction)
    return said.count(number) / len(said) if said else 0.0


def paragraph_share(prediction: str, answer: str) -> float:
    """number_share of the N of an answer `Paragraph N`."""
    named = re.search(r"Paragraph (\d+)", answer)
    assert named is not None, "rows without a paragraph are refused when the file is read"
    return number_share(prediction, named[1])


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity of the first line of code (one without back-tick, # and //), in whole percent; 0 if one is empty."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def best_of(score: Callable[[str, str], float], first_line: bool = False) -> Metric:
    """LongBench's rule: the best score over the answers, of the prediction or of its first line that is not empty."""

    def metric(prediction: str, answers: Sequence[Any], classes: Sequence[str]) -> float:
        text = prediction.lstrip("\n").split("\n")[0] if first_line else prediction
        return max((score(text, answer) for answer in answers), default=0.0)

    return metric


def best_class(prediction: str, answers: Sequence[Any], classes: Sequence[str]) -> float:
    """`classification` of the first line, best over the answers."""
    text = prediction.lstrip("\n").split("\n")[0]
    return max((classification(text, answer, classes) for answer in answers), default=0.0)


# -- RULER and needle


def found_all(prediction: str, answers: Sequence[Any], classes: Sequence[str] = ()) -> float:
    """RULER's string_match_all: the share of the answers that the prediction contains, whatever their case."""
    said = _printable(prediction)
    return sum(answer.lower() in said for answer in answers) / len(answers) if answers else 0.0


def found_any(prediction: str, answers: Sequence[Any], classes: Sequence[str] = ()) -> float:
    """RULER's string_match_part: whether the prediction contains any answer."""
    said = _printable(prediction)
    return float(any(answer.lower() in said for answer in answers))


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()


def words_found(prediction: str, answers: Sequence[Any], classes: Sequence[str] = ()) -> float:
    """The needle heat maps' score: the share of distinct expected words among the distinct words of the response.

    Words are what white space separates, in lower case, punctuation included. answers: (needle, expected words).
    """
    expected = set(answers[1].lower().split())
    return len(expected & set(prediction.lower().split())) / len(expected)


def needle_rouge(prediction: str, answers: Sequence[Any], classes: Sequence[str] = ()) -> float:
    """The needle runner's score: ROUGE-1 F1 of the response against the needle, stemmed (there times ten)."""
    return _scorer("rouge1", True).score(answers[0], prediction)["rouge1"].fmeasure if prediction.strip() else 0.0


@cache
def _scorer(kind: str, stem: bool) -> Any:
    rouge_version()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=stem)


def rouge_version() -> dict[str, str]:
    """What a manifest says of the library that these metrics come from."""
    try:
        return {"rouge-score": version("rouge-score")}
    except PackageNotFoundError:
        raise PromptError("this metric is rouge-score's: pip install 'restkv[eval]'") from None


def rouge_l_sum(prediction: str, answers: Sequence[Any], classes: Sequence[str] = ()) -> float:
    """InfiniteBench's summaries: rougeLsum F1 of rouge-score, unstemmed, best over the answers."""
    return _scorer("rougeLsum", False).score_multi(answers, prediction)["rougeLsum"].fmeasure

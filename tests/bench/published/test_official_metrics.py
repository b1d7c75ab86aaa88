"""The published metrics: values computed by hand, quirks included, and beside the libraries they are defined by."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.published import infinite_metrics as infinite
from bench.published import metrics
from bench.published.infinitebench import TASKS as INFINITEBENCH
from bench.published.longbench import TASKS as LONGBENCH

# (prediction, answer, value); every value is a fraction that can be counted from the words.
QA_F1 = [
    ("Paris", "Paris", 1),
    ("The answer is Paris.", "Paris", 1 / 2),  # answer, is, paris: precision 1/3, recall 1
    ("paris, france", "Paris", 2 / 3),  # precision 1/2
    ("an apple a day", "the apple day", 1),  # articles go
    ("a a a", "the", 0),  # nothing is left on either side
    ("", "Paris", 0),
    ("Paris", "", 0),
    ("red red blue", "red blue blue", 2 / 3),  # bags: red 1, blue 1 of 3 and 3
    ("it's", "its", 1),  # punctuation goes without a gap
    ("well-known fact", "well known fact", 2 / 5),  # wellknown, fact: 1 of 2 and 1 of 3
    ("Ärger", "ärger", 1),
    ("theatre", "atre", 0),  # an article is a whole word
    ("“Paris”", "Paris", 0),  # typographic quotes are not ASCII punctuation
]
CHARACTER_F1 = [
    ("北京", "北京", 1),
    ("北京。", "《北京》", 4 / 5),  # 北京 / 《北京: the opening bracket stays; 2 of 2 and 2 of 3
    ("在 北京！", "北京", 4 / 5),  # 2 of 3 and 2 of 2
    ("上海", "北京", 0),
    ("ABA", "ab", 4 / 5),  # a, b, a / a, b: 2 of 3 and 2 of 2
    ("北北京", "北京京", 2 / 3),
    ("……", "北京", 0),
]
ROUGE_L = [
    ("the cat sat", "the cat sat", 1),
    ("the cat", "the cat sat", 4 / 5),  # precision 1, recall 2/3
    ("sat the cat", "the cat sat", 2 / 3),  # longest common subsequence: the cat
    ("the the the", "the", 1),  # sets: {the} of {the}
    ("a b. c d", "c d. a b", 1),  # every pair of sentences is compared
    ("a b c", "x y", 0),
    ("a b. ", "a b", 4 / 5),  # the white space after the full stop is a sentence of one empty word: 2 of 3, 2 of 2
    ("", "a", 0),
    ("...", "a", 0),
    ("a", ".", 0),
    ("A", "a", 0),  # case counts
    ("a b c d", "a c. b d", 1),  # a c and b d are each a subsequence; their union is all four
    ("b a", "a b", 1 / 2),  # walking back prefers the shorter side of the prediction: one word of two
]
CLASSES = ("Number", "Number of days", "Date", "Days")
CLASSIFICATION = [
    ("Date", "Date", 1),
    ("Date or Number", "Date", 1 / 2),
    ("Number of days", "Number of days", 1),  # Number is part of the right one and goes
    ("Number of days", "Number", 1 / 2),  # both are found, none is part of Number
    ("date", "Date", 0),  # case counts
    ("Days, a Date", "Number", 0),
    ("", "Date", 0),
]
COUNT = [
    ("7", "7", 1),
    ("There are 7 of 10 paragraphs", "7", 1 / 2),
    ("7 7 8", "7", 2 / 3),
    ("seven", "7", 0),
    ("07", "7", 0),  # compared as text
    ("17", "7", 0),
    ("", "7", 0),
]
RETRIEVAL = [
    ("Paragraph 3", "Paragraph 3", 1),
    ("3 or 4", "Paragraph 3", 1 / 2),
    ("Paragraph 13", "Paragraph 3", 0),
    ("none", "Paragraph 3", 0),
]
CODE = [
    ("return x", "return x", 1),
    ("\n\nreturn x\nmore", "return x", 1),
    ("# comment\nreturn x", "return x", 1),
    ("```\n// c\nreturn x", "return x", 1),
    ("abcd", "abcx", 0.75),  # 2 * 3 of 8 letters
    ("abc", "ab", 0.8),  # 2 * 2 of 5
    ("abc", "abd", 0.67),  # 2 * 2 of 6, rounded to whole percent
    ("# all comments", "x", 0),
    ("", "x", 0),
    ("  \nx = 1", "x = 1", 0.57),  # a line of blanks is a line: both blanks match, 2 * 2 of 7
    ("xyz", "", 0),
]


@pytest.mark.parametrize(
    ("score", "cases"),
    [
        (metrics.qa_f1, QA_F1),
        (metrics.character_f1, CHARACTER_F1),
        (metrics.rouge_l, ROUGE_L),
        (lambda p, a: metrics.classification(p, a, CLASSES), CLASSIFICATION),
        (metrics.number_share, COUNT),
        (metrics.paragraph_share, RETRIEVAL),
        (metrics.code_similarity, CODE),
    ],
    ids=["qa_f1", "character_f1", "rouge_l", "classification", "count", "retrieval", "code"],
)
def test_values_by_hand(score: Any, cases: list[tuple[str, str, float]]) -> None:
    for prediction, answer, value in cases:
        assert score(prediction, answer) == pytest.approx(value, abs=1e-7), (prediction, answer)


def test_there_are_enough_of_them() -> None:
    by_hand: list[list[Any]] = [QA_F1, CHARACTER_F1, ROUGE_L, CLASSIFICATION, COUNT, RETRIEVAL, CODE, RULER, INFINITE]
    assert sum(map(len, by_hand)) >= 100


def test_classification_skips_the_name_after_a_dropped_one() -> None:
    """The released loop removes while it walks: after `a` is dropped, `ab` is not looked at, and stays."""
    classes = ("a", "ab", "abc")
    assert metrics.classification("abc", "abc", classes) == 1 / 2  # ab and abc are left
    assert metrics.classification("abc", "abc", ("ab", "x", "a", "abc")) == 1 / 2  # x is not found: a is skipped


def test_longbench_takes_the_best_answer_and_the_first_line_where_it_should() -> None:
    trivia, hotpot = LONGBENCH["triviaqa"][0], LONGBENCH["hotpotqa"][0]
    assert hotpot("Paris", ["London", "Paris"], ()) == 1
    assert hotpot("Paris\nQuestion: next", ["Paris"], ()) == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert trivia("\n\nParis\nQuestion: next", ["Paris"], ()) == 1
    assert trivia("Paris", [], ()) == 0
    samsum = LONGBENCH["samsum"][0]
    assert samsum("a b\nDialogue:", ["a b"], ()) == pytest.approx(1, abs=1e-7)
    assert LONGBENCH["trec"][0]("\nDate\nNumber", ["Date"], CLASSES) == 1
    assert LONGBENCH["passage_count"][0]("3", ["3"], ()) == 1
    assert LONGBENCH["passage_retrieval_en"][0]("Paragraph 2", ["Paragraph 2"], ()) == 1
    assert LONGBENCH["lcc"][0]("x = 1\ny", ["x = 1"], ()) == 1


# -- beside the libraries

WORDS = st.lists(st.sampled_from(["a", "b", "c", "the", ".", "..", " ", "\n", "é"]), max_size=14).map(" ".join)


@given(WORDS, WORDS)
@example("a. ", " .a")
def test_rouge_l_is_the_packages(prediction: str, answer: str) -> None:
    rouge = pytest.importorskip("rouge")
    try:
        theirs = rouge.Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:  # the released scorer takes any exception for 0
        theirs = 0.0
    assert metrics.rouge_l(prediction, answer) == pytest.approx(theirs, abs=1e-12)


def test_where_the_package_runs_out_of_recursion_there_is_a_value() -> None:
    rouge = pytest.importorskip("rouge")
    long = " ".join(f"w{number}" for number in range(sys.getrecursionlimit()))
    with pytest.raises(RecursionError):
        rouge.Rouge().get_scores(["w0"], [long])
    assert metrics.rouge_l("w0", long) == pytest.approx(2 / (1 + sys.getrecursionlimit()))  # 1 of 1 and 1 of all


@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")
@given(st.text("abc#/` =\n", max_size=30), st.text("abc =", max_size=30))
@example("a" * 250 + "b", "b" + "a" * 250)  # difflib takes frequent letters of long texts for junk
def test_code_similarity_is_fuzzywuzzys_without_levenshtein(prediction: str, answer: str) -> None:
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher.__module__ != "difflib":
        pytest.skip("python-Levenshtein is installed, and gives other values")
    line = next((x for x in prediction.lstrip("\n").split("\n") if not any(m in x for m in ("`", "#", "//"))), "")
    assert metrics.code_similarity(prediction, answer) == fuzz.ratio(line, answer) / 100


def test_rouge_of_summaries_and_needles_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # Lines are sentences: the union of common subsequences of "a b" and "c d" with "a b c d" covers all four words.
    assert metrics.rouge_l_sum("a b c d", ["a b\nc d"]) == 1
    assert metrics.rouge_l_sum("a b", ["a b c d"]) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert metrics.rouge_l_sum("", ["a b"]) == 0
    assert metrics.rouge_l_sum("a b", ["c d", "a b c d"]) == pytest.approx(2 / 3)  # the best of several answers
    assert metrics.needle_rouge("sat in parks", ["sit in the park", ""]) == pytest.approx(
        2 * (2 / 3) * (1 / 2) / (7 / 6)
    )
    assert metrics.needle_rouge("\n ", ["sit in the park", ""]) == 0


# -- RULER, needle

RULER = [
    (metrics.found_all, "It is 12 and 34", ["12", "34"], 1),
    (metrics.found_all, "It is 12", ["12", "34"], 1 / 2),
    (metrics.found_all, "It is 123", ["12"], 1),  # a substring counts
    (metrics.found_all, "ABC", ["abc"], 1),
    (metrics.found_all, "a\x07b", ["a\nb"], 1),  # control characters become line breaks
    (metrics.found_all, "", ["12"], 0),
    (metrics.found_all, "12", [], 0),
    (metrics.found_any, "Paris it is", ["London", "Paris"], 1),
    (metrics.found_any, "Rome", ["London", "Paris"], 0),
    (metrics.words_found, "Eat a sandwich", ["", "eat a sandwich in a park."], 3 / 5),
    (metrics.words_found, "in a park", ["", "eat a sandwich in a park."], 2 / 5),  # park is not park.
    (metrics.words_found, "", ["", "eat"], 0),
]

# -- InfiniteBench

DEBUG = ["broken_fn", "C"]
BOOK = ["A red door", "B"]
INFINITE = [
    (infinite.first_integer, "The key is 00123.", ["00123"], 1),
    (infinite.first_integer, "1, then 2", ["2"], 0),
    (infinite.first_integer, "none", ["2"], 0),
    (infinite.value_among_words, 'The value is "ab-12".', ["ab-12"], 1),
    (infinite.value_among_words, "ab-123", ["ab-12"], 0),
    (infinite.value_among_words, "Theab", ["ab"], 0),
    (infinite.value_among_words_paper, "Theab", ["ab"], 1),  # the letters The are blanked
    (infinite.value_among_words_paper, "ab</s>", ["ab"], 1),
    (infinite.name_found, "it was jane doe", ["JANE", "X"], 1),
    (infinite.name_found, "JANETTE", ["JANE"], 1),  # a substring
    (infinite.name_among_words, "It was Jane.", ["JANE"], 1),
    (infinite.name_among_words, "JANETTE", ["JANE"], 0),
    (infinite.name_among_words, "it was jane", ["Jane"], 0),  # the label is not put in capitals
    (infinite.last_integer, "The value is -7.", [-7], 1),
    (infinite.last_integer, "7 apples", [7], 0),
    (infinite.last_integer, "", [7], 0),
    (infinite.first_number, "It is 3, not 4", [3], 1),
    (infinite.first_number, "3.5", [3], 0),
    (infinite.first_number, "3.5", [3.5], 1),
    (infinite.first_number, "x", [3], 0),
    (infinite.first_number_paper, "3.5", [3], 1),  # cut down to 3
    (infinite.matching_prefix, "[1, 4, 9]", [1, 4, 8], 2 / 3),
    (infinite.matching_prefix, "1 4", [[1, 4, 8]], 2 / 3),  # a list in a list
    (infinite.matching_prefix, "-1 4", [1, 4], 1),  # signs are lost
    (infinite.matching_prefix_paper, "1 4", [[1, 4]], 0),
    (infinite.matching_prefix_paper, "2 1", [1], 0),
    (infinite.choice, "B", BOOK, 1),
    (infinite.choice, "A or rather B", BOOK, 1),  # the last lone letter
    (infinite.choice_paper, "A or rather B", BOOK, 0),  # the first letter of the text
    (infinite.choice_paper, "  B. red", BOOK, 1),
    (infinite.choice_paper, "the answer is: B", BOOK, 1),
    (infinite.choice_paper, "the answer is", BOOK, 0),
    (infinite.choice_paper, "I say B", BOOK, 1),
    (infinite.choice_paper, "I say AB", BOOK, 0),
    (infinite.choice_paper, "", BOOK, 0),
    (infinite.choice_paper, "the option is A red door", BOOK, 1),
    (infinite.debug, "C", DEBUG, 1),
    (infinite.debug, "B or C", DEBUG, 1),
    (infinite.debug, "broken_fn", DEBUG, 1),
    (infinite.debug, "I think the answer is: broken_fn", DEBUG, 1),
    (infinite.debug, "A", DEBUG, 0),
    (infinite.debug_paper, "C. broken", DEBUG, 1),
    (infinite.debug_paper, "C broken", DEBUG, 1),
    (infinite.debug_paper, "C", DEBUG, 0),  # nothing after the letter
    (infinite.debug_paper, "broken_fn", DEBUG, 0),
    (infinite.debug_paper, "answer is: C", DEBUG, 1),
    (infinite.debug_paper, "answer is:", DEBUG, 0),
]


@pytest.mark.parametrize("case", [*RULER, *INFINITE], ids=lambda case: f"{case[0].__name__}-{case[1][:12]!r}")
def test_scorers_by_hand(case: tuple[Any, str, list[Any], float]) -> None:
    metric, prediction, labels, value = case
    assert metric(prediction, labels, ()) == pytest.approx(value)


def test_every_infinitebench_task_has_both_scorers() -> None:
    assert len(INFINITEBENCH) == 12
    best = INFINITEBENCH["longbook_qa_eng"].metric
    assert best("Paris", ["Rome", "Paris"], ()) == 1 and best("Paris", [], ()) == 0
    assert INFINITEBENCH["longbook_qa_chn"].metric("北京", ["上海", "北京"], ()) == 1

"""Generated questions: answerable, as long as asked, the same for everybody; and scored as they should be."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality.prose import ADJECTIVES, CODED_WORDS, NOUNS, PADS, SYLLABLES, listing, sentences
from bench.quality.tasks import DEPTH_TASKS, TASKS, Frame, Sample, make_sample, score
from make.words import word_tokenizer
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL
from restkv.errors import PromptError

FRAMES = {
    "words": Frame(word_tokenizer()),
    "chat": Frame(word_tokenizer(chat=True), chat=True),
    "bytes": Frame(Tokenizer.from_folder(RECALL)),
}
LENGTHS = (512, 1100)
NIAH = [task for task in TASKS if task.startswith("niah")]
FRAME = FRAMES["words"]


def make(task: str, length: int = 600, index: int = 0, seed: int = 0, **options: float) -> Sample:
    return make_sample(task, length, seed, index, FRAME, **options)


def tokens(sample: Sample, frame: Frame) -> int:
    return sum(map(len, frame.ids(sample.context, sample.question, sample.answer_prefix))) + sample.max_new_tokens


# -- length


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("task", TASKS)
def test_length_is_within_one_percent_of_what_was_asked(task: str, frame: Frame) -> None:
    for length in LENGTHS:
        for index in range(3):
            sample = make_sample(task, length, 0, index, frame)
            assert 0.99 * length <= tokens(sample, frame) <= length


@settings(max_examples=40)
@given(
    task=st.sampled_from(sorted(TASKS)),
    length=st.integers(600, 3000),
    seed=st.integers(0, 99),
    index=st.integers(-1, 99),
)
def test_length_holds_everywhere(task: str, length: int, seed: int, index: int) -> None:
    assert 0.99 * length <= tokens(make_sample(task, length, seed, index, FRAME), FRAME) <= length


def test_length_counts_the_chat_template_and_the_answer() -> None:
    plain, chat = (make_sample("niah_single", 512, 0, 0, FRAMES[name]) for name in ("words", "chat"))
    assert len(chat.context) < len(plain.context)
    assert plain.max_new_tokens == FRAME.count(plain.target) + 16


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_for_the_question_is_refused(task: str) -> None:
    with pytest.raises(PromptError, match=f"task {task}: length 40 is too short"):
        make(task, length=40)


# -- what is asked can be answered


@pytest.mark.parametrize("task", NIAH)
@pytest.mark.parametrize("index", range(5))
def test_needles_are_in_the_context_once_each_where_they_should_be(task: str, index: int) -> None:
    sample = make(task, length=1100, index=index)
    assert len(sample.meta["needles"]) == (1 if task == "niah_single" else 4)
    for needle, depth in sample.meta["needles"]:
        assert sample.context.count(needle) == 1
        at = sample.context.index(needle) / (len(sample.context) - len(needle))
        assert abs(at - depth) < 0.05
    assert (
        len(set(sample.answers)) == len(sample.answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    )
    assert all(sample.context.count(answer) == 1 for answer in sample.answers)


@pytest.mark.parametrize("task", NIAH)
def test_the_prompt_ends_in_the_words_before_the_needles_value(task: str) -> None:
    for index in range(5):
        sample = make(task, index=index)
        assert f"{sample.answer_prefix} {sample.answers[0]}." in sample.context
        asked = {needle for needle, _ in sample.meta["needles"] if any(answer in needle for answer in sample.answers)}
        for needle in asked:
            thing = re.fullmatch(r"The (?:(?:first|second|third|fourth) )?code of the (\w+ \w+) is \d{5}\.", needle)
            assert thing and f"the {thing[1]}" in sample.question


@pytest.mark.parametrize("task", DEPTH_TASKS)
@pytest.mark.parametrize("depth", (0.0, 0.25, 0.5, 1.0))
def test_the_asked_needle_is_at_the_asked_depth(task: str, depth: float) -> None:
    for index in range(3):
        sample = make(task, length=1100, index=index, depth=depth)
        needle = f"{sample.answer_prefix} {sample.answers[0]}."
        filler_before = sample.context.index(needle)
        assert abs(filler_before / (len(sample.context) - len(needle)) - depth) < 0.05
        assert sample.depth == depth
        if depth == 1:
            assert sample.context.endswith(needle)
        if depth == 0:  # nothing but the introduction and what pads the length
            before = re.findall(r"[^.]+\.", sample.context[:filler_before])[2:]
            assert all(sentence.strip() in PADS for sentence in before)


def test_depths_cover_the_context_when_none_is_asked_for() -> None:
    drawn = [make("niah_single", length=300, index=index).depth for index in range(60)]
    depths = [depth for depth in drawn if depth is not None]
    assert min(depths) < 0.1 and max(depths) > 0.9 and len(set(depths)) == 60


def test_multikey_tells_other_things_other_numbers() -> None:
    sample = make("niah_multikey")
    things = [re.match(r"The code of the (.+) is (\d+)", needle) for needle, _ in sample.meta["needles"]]
    names, numbers = zip(*(found.groups() for found in things if found), strict=True)
    words = [word for name in names for word in name.split()]
    assert len(set(words)) == 8 and len(set(numbers)) == 4  # no two things share a word


def test_multiquery_continues_in_the_order_of_the_question() -> None:
    sample = make("niah_multiquery")
    said = f"{sample.answer_prefix}{sample.target}"
    assert [said.index(answer) for answer in sample.answers] == sorted(said.index(answer) for answer in sample.answers)
    for needle, _ in sample.meta["needles"]:
        assert needle.removesuffix(".").lower() in said.lower()


@pytest.mark.parametrize("index", range(10))
def test_tracking_the_boxes_leads_to_the_answers(index: int) -> None:
    sample = make("vt", index=index)
    number = re.search(r"is (\d{5})\?", sample.question)
    assert number
    boxes = re.findall(r"The box around (\w+) is (\w+)\.", sample.context)
    links = dict(boxes)
    assert len(boxes) == len(links) == 6
    chain = [links[number[1]]]
    assert f"{sample.answer_prefix} {chain[0]}." in sample.context
    while chain[-1] in links:
        chain.append(links[chain[-1]])
    assert tuple(chain) == sample.answers and len(chain) == 3
    assert sample.context.index(f"is {chain[0]}.") < sample.context.index(f"is {chain[1]}.")
    steps = re.findall(r"[Tt]he box around (\w+) is (\w+)", f"{sample.answer_prefix}{sample.target}")
    assert steps == list(pairwise([number[1], *chain]))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_common_words_are_by_far_the_most_common(length: int) -> None:
    for index in range(4):
        sample = make("cwe", length=length, index=index)
        listed = re.search(r"This is the list: (.*)\.$", sample.context)
        assert listed
        counts = Counter(listed[1].split(", ")).most_common()
        assert {word for word, _ in counts[:5]} == set(sample.answers)
        assert counts[4][1] >= 2 * counts[5][1]
        assert sum(count for _, count in counts) == sample.meta["units"]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_frequent_words_are_strictly_ordered(length: int) -> None:
    for index in range(4):
        sample = make("fwe", length=length, index=index)
        sent = re.search(r"This is the message: (.*)\.$", sample.context)
        assert sent
        counts = Counter(sent[1].split()).most_common()
        assert tuple(word for word, _ in counts[:3]) == sample.answers
        assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
        assert all(re.fullmatch(f"({'|'.join(SYLLABLES)}){{2}}", word) for word, _ in counts)


@pytest.mark.parametrize("task", TASKS)
def test_the_target_is_a_right_answer_and_the_question_alone_is_none(task: str) -> None:
    sample = make(task)
    assert score(sample.target, sample.answers) == 1
    assert score(f"{sample.question} {sample.answer_prefix}", sample.answers) == 0


# -- the same for everybody


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_seed_and_number_only(task: str) -> None:
    sample = make(task)
    Random(1).random()
    assert make(task) == sample
    others = [make(task, index=1), make(task, seed=1), make(task, length=601)]
    assert len({sample.context, *(other.context for other in others)}) == 4


def test_samples_are_the_same_in_every_process_and_version() -> None:
    """A changed digest is a changed benchmark: results of before are no longer comparable."""
    digest = hashlib.sha256()
    for task in TASKS:
        sample = make(task, seed=7, index=3)
        digest.update(f"{sample.context}|{sample.question}|{sample.answer_prefix}|{sample.target}".encode())
    assert digest.hexdigest()[:16] == "c26a57c965d79cb6"


def test_filler_is_prose_without_numbers_and_without_a_scene_repeating_itself() -> None:
    told = list(islice(sentences(Random(5)), 2000))
    assert all(re.fullmatch(r'["A-Z][^0-9{}]*[.?]"?( said [^.]*\.)?', sentence) for sentence in told)
    assert not any(re.search(r"\ba [aeiou]", sentence) for sentence in told)
    assert not any("code" in sentence or "box around" in sentence for sentence in told)
    assert len(set(told)) > 0.6 * len(told)


def test_word_lists_have_no_doubles() -> None:
    for words in (NOUNS, ADJECTIVES, PADS, SYLLABLES, CODED_WORDS):
        assert len(set(words)) == len(words)
    assert not set(NOUNS) & set(ADJECTIVES)
    assert [listing(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


# -- as tokens


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_context_and_question_joined_are_the_whole_prompt(frame: Frame) -> None:
    sample = make_sample("niah_multikey", 512, 0, 0, frame)
    context, asked = frame.ids(sample.context, sample.question, sample.answer_prefix)
    whole = frame.tokenizer.decode(context + asked)
    told, end = frame.tokenizer.decode(context), f"{sample.question} {sample.answer_prefix}"
    assert told.endswith(sample.context[-20:]) and sample.question not in told
    if frame.chat:
        assert whole == f"<user> {sample.context} {sample.question} <end><assistant>{sample.answer_prefix}".replace(
            "<s>", ""
        )
    else:
        assert whole == f"{sample.context} {end}"
        assert context + asked == frame.tokenizer.encode(whole)


def test_a_word_piece_across_the_end_of_the_context_belongs_to_the_question() -> None:
    class Joined:
        """Two characters a token, so that an odd context ends in the middle of one."""

        def encode(self, text: str, bos: bool = True) -> list[int]:
            return [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]

    context, asked = Frame(Joined()).ids("abc", "defg", "h")  # type: ignore[arg-type]
    assert context == [ord("a") + ord("b")]
    assert context + asked == Joined().encode("abc defg h")


# -- scoring


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        ("48213", ["48213"], 1),
        (" It is 48213, I think", ["48213"], 1),
        ("**48213**", ["48213"], 1),
        ("_48213_", ["48213"], 1),
        ("482134", ["48213"], 0),
        ("148213", ["48213"], 0),
        ("48 213", ["48213"], 0),
        ("", ["48213"], 0),
        ("11111 and 22222", ["22222", "11111"], 1),
        ("22222, 11111", ["22222", "11111"], 1),
        ("only 22222", ["22222", "11111"], 0.5),
        ("11111 11111 11111", ["11111", "22222", "33333", "44444"], 0.25),
        ("BAKO, fidu and Miru", ["Bako", "Fidu", "Miru"], 1),
        ("bakofi", ["bako"], 0),
        ("kettles and a drum", ["kettle", "drum"], 0.5),
        ("the kettle; the drum", ["kettle", "drum"], 1),
        ("a.b", ["a+b"], 0),
    ],
)
def test_score_is_the_share_of_answers_found(output: str, answers: list[str], expected: float) -> None:
    assert score(output, answers) == expected


# -- bad input


def test_unknown_tasks_and_impossible_depths_are_refused() -> None:
    with pytest.raises(PromptError, match=r"task 'niah' is unknown; choose from niah_single, "):
        make("niah")
    with pytest.raises(PromptError, match=r"depth 1\.5: give one in \[0, 1\]"):
        make("niah_single", depth=1.5)
    with pytest.raises(PromptError, match="only to niah_single, niah_multikey"):
        make("vt", depth=0.5)

"""Retrieval questions over long contexts: the task families of RULER (Hsieh et al., 2024, arXiv 2404.06654;
docs/sources.md §4.1), in a small English and words of our own.

    niah_single      one thing has a code, a number; which?
    niah_multikey    four things have codes, one is asked for
    niah_multivalue  one thing has four codes, a first to a fourth; which?
    niah_multiquery  four things have codes, all are asked for
    vt               variable tracking: a number is in a box, that box in a second box, and so on; in which boxes is it?
    cwe              common words: a list of words, five of which come up far more often than the others
    fwe              frequent words: a message of coded words with a Zipf distribution; which three are the most frequent?

A sample is a function of (task, length, seed, index) and of the tokenizer, which alone says how much filler fits. A question
ends with the very words that stand before the value in the context, and an answer goes on in such sentences, so that a model
need not be trained on instructions: "The code of the amber kettle is" calls for what followed these words before.
Departures from RULER are listed in docs/benchmarks.md.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations, islice, pairwise
from typing import Any

from bench.quality.prose import ADJECTIVES, CODED_WORDS, NOUNS, PADS, listing, require_room, sentences
from modeling.text.tokenizer import Tokenizer
from restkv.errors import PromptError

ANSWER_ROOM = 16  # tokens an answer may take beyond the expected one
COUNTS = {1: "", 2: "two ", 3: "three ", 4: "four "}
ORDINALS = ("first", "second", "third", "fourth")
Needle = tuple[str, float]  # a sentence, and its depth in the context


@dataclass(frozen=True)
class Sample:
    """A question over a context.

    Attributes:
        context, question, answer_prefix: the prompt's three parts, to be joined by spaces; the model goes on from the last.
        answers: the strings a right answer contains, in any order.
        target: the expected continuation (without its full stop).
        depth: where in the context the asked needle stands, 0 = its beginning; None for tasks with several.
        max_new_tokens: the room for the answer.
        meta: what the task drew: "needles" (sentence, depth), and how many "units" of filler there are.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    target: str
    depth: float | None
    max_new_tokens: int
    meta: dict[str, Any]


def parted(whole: list[int], start: list[int]) -> tuple[list[int], list[int]]:
    """The tokens of a text in two parts, given those of its beginning alone.

    Where a word piece reaches over the end of the beginning it belongs to the rest.
    """
    shared = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
    return whole[:shared], whole[shared:]


@dataclass(frozen=True)
class Frame:
    """How a sample becomes token ids: as plain text, or as the user's turn of a chat whose answer has already begun."""

    tokenizer: Tokenizer
    chat: bool = False

    def ids(self, context: str, question: str, answer_prefix: str) -> tuple[list[int], list[int]]:
        """Token ids of the context, and of what follows it. Joined, they are exactly the encoding of the whole prompt."""
        told, asked = f"{context} {question}", answer_prefix
        if not self.chat:
            whole = self.tokenizer.encode(f"{told} {asked}")
            start = self.tokenizer.encode(context)
        else:
            turn = self.tokenizer.render([{"role": "user", "content": told}])
            whole = self.tokenizer.encode(turn + asked, bos=False)  # the template itself writes any BOS
            start = self.tokenizer.encode(turn[: turn.rindex(question)].rstrip(), bos=False)
        return parted(whole, start)

    def count(self, text: str) -> int:
        """Tokens of a text that follows another one."""
        return len(self.tokenizer.encode(f"So. {text}", bos=False)) - len(self.tokenizer.encode("So.", bos=False))

    @cached_property
    def pads(self) -> list[tuple[int, tuple[str, ...]]]:
        """(tokens, one to three short sentences), from none to many tokens, one choice for each number of tokens."""
        cost = {pad: self.count(pad) for pad in PADS}
        choices = {0: ()} | {
            sum(cost[pad] for pad in some): some
            for size in (3, 2, 1)  # fewer sentences win
            for some in combinations(PADS, size)
        }
        return sorted(choices.items())


@dataclass(frozen=True)
class Draft:
    """What a task draws before it is known how much filler fits.

    Attributes:
        body: the context's sentences made of n units of filler, whatever else it has to say among them.
        needles: (sentence, depth) of those among it.
        clear: whether n units are enough for the question to have one answer.
    """

    intro: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    target: str
    body: Callable[[int], list[str]]
    depth: float | None = None
    needles: Sequence[Needle] = ()
    clear: Callable[[int], bool] = lambda units: True

    def context(self, units: int, pads: Sequence[str] = ()) -> str:
        return " ".join([self.intro, *pads, *self.body(units)])


SAID = ("question", "answer_prefix", "answers", "target", "depth")  # by drafts and samples alike


def make_sample(task: str, length: int, seed: int, index: int, frame: Frame, depth: float | None = None) -> Sample:
    """Sample number `index` of a task, `length` tokens long (prompt and room for the answer) to within 1 %.

    Args:
        depth: where the needle shall be, in [0, 1]; only for DEPTH_TASKS, which draw it when it is not given.
    """
    if task not in TASKS:
        raise PromptError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
    if depth is not None and (task not in DEPTH_TASKS or not 0 <= depth <= 1):
        raise PromptError(f"task {task}: depth {depth}: give one in [0, 1], and only to {', '.join(DEPTH_TASKS)}")
    require_room(length)
    key = f"{task}/{length}/{seed}/{index}"
    draft = TASKS[task](random.Random(key), key, depth)
    room = frame.count(draft.target) + ANSWER_ROOM
    context, units = _fit(draft, frame, length, room, f"task {task}: length {length}")
    if not draft.clear(units):
        raise PromptError(f"task {task}: length {length} is too short for its counts to differ; ask for more")
    said = {name: getattr(draft, name) for name in SAID}
    return Sample(context, **said, max_new_tokens=room, meta={"needles": draft.needles, "units": units})


def score(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that the output contains, whatever their case and order; 1234 is not found in 12345."""
    found = (re.search(rf"(?<![^\W_]){re.escape(answer)}(?![^\W_])", output, re.IGNORECASE) for answer in answers)
    return sum(map(bool, found)) / len(answers)


# -- length


def _fit(draft: Draft, frame: Frame, length: int, room: int, what: str) -> tuple[str, int]:
    """The context with which prompt and room come nearest to `length` tokens without being longer; its units of filler."""

    def tokens(units: int, pads: Sequence[str] = ()) -> int:
        context, asked = frame.ids(draft.context(units, pads), draft.question, draft.answer_prefix)
        return len(context) + len(asked) + room

    low, at_low = 0, tokens(0)
    if at_low > length:
        raise PromptError(f"{what} is too short with this tokenizer; it needs {at_low} tokens before any filler")
    high = max(1, length // 16)
    while (at_high := tokens(high)) <= length:
        low, at_low, high = high, at_high, 2 * high
    while high - low > 1:
        # Tokens grow almost evenly with the units, so that interpolation finds the cut in a few steps.
        middle = low + round((high - low) * (length - at_low) / (at_high - at_low))
        middle = min(max(middle, low + 1), high - 1)
        at_middle = tokens(middle)
        if at_middle <= length:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    best, missing = draft.context(low), length - at_low
    for units in (low, low - 1, low - 2):  # with one unit less there is room for more kinds of pads
        if missing == 0 or units < 0:
            break
        gap = length - (at_low if units == low else tokens(units))
        fitting = [pads for cost, pads in frame.pads if cost <= gap]
        for pads in reversed(fitting[-3:]):  # costs add up but for word pieces that join
            left = length - tokens(units, pads)
            if 0 <= left < missing:
                best, missing, low = draft.context(units, pads), left, units
                break
    return best, low


# -- needles in prose


def _prose(rng: random.Random, needles: Sequence[Needle]) -> Callable[[int], list[str]]:
    """n sentences of filler, with needles between them, each at its depth."""
    source = sentences(random.Random(rng.getrandbits(64)))
    drawn: list[str] = []

    def body(units: int) -> list[str]:
        drawn.extend(islice(source, max(0, units - len(drawn))))
        filler = drawn[:units]
        ends = [0, *accumulate(len(sentence) + 1 for sentence in filler)]
        placed = sorted((_nearest(ends, depth * ends[-1]), depth, order) for order, (_, depth) in enumerate(needles))
        text, start = [], 0
        for at, _, order in placed:
            text += [*filler[start:at], needles[order][0]]
            start = at
        return text + filler[start:]

    return body


def _nearest(ends: Sequence[int], place: float) -> int:
    """Index of the sentence end nearest to a place in the text."""
    at = bisect_left(ends, place)
    return min((i for i in (at - 1, at) if 0 <= i < len(ends)), key=lambda i: abs(ends[i] - place))


def _depths(rng: random.Random, count: int) -> list[float]:
    """One depth in each of `count` equal parts of the text, in text order."""
    return [(part + rng.random()) / count for part in range(count)]


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def draw_things(rng: random.Random, count: int) -> list[str]:
    """Names such as "amber kettle", no two with a word in common."""
    pairs = zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)
    return [" ".join(pair) for pair in pairs]


def draw_names(rng: random.Random, count: int) -> list[str]:
    """Names such as "Kari"."""
    return [word.capitalize() for word in rng.sample(CODED_WORDS, count)]


CODES_INTRO = "Some of the things in this story have a code. Remember which."
BOXES_INTRO = "Numbers were hidden in boxes, and boxes in other boxes. Every box has a name."
Fact = tuple[str, str]  # (what the sentence says up to the value, the value)


def code_facts(things: Sequence[str], numbers: Sequence[str]) -> list[Fact]:
    """The n-th number belongs to the n-th thing, and round again; codes of a thing that has several are numbered."""
    rounds = [f"{ordinal} " for ordinal in ORDINALS] if len(numbers) > len(things) else [""]
    return [
        (f"The {rounds[i // len(things)]}code of the {things[i % len(things)]} is", number)
        for i, number in enumerate(numbers)
    ]


def box_facts(number: str, boxes: Sequence[str]) -> list[Fact]:
    """The number is in the first box, that in the second, and so on."""
    return [(f"The box around {inner} is", outer) for inner, outer in pairwise([number, *boxes])]


def told(fact: Fact) -> str:
    """The sentence in the context."""
    return " ".join(fact) + "."


def asked(facts: Sequence[Fact]) -> tuple[str, str]:
    """(answer prefix, target) of an answer that tells these facts: the prefix is the first one without its value."""
    later = [f" and {stem[0].lower()}{stem[1:]} {value}" for stem, value in facts[1:]]
    return facts[0][0], "".join([f" {facts[0][1]}", *later])


def code_question(things: Sequence[str], codes: int) -> str:
    """For `codes` codes of one thing, or for the codes of things that have one each."""
    if len(things) > 1:
        return f"Which codes do {listing([f'the {thing}' for thing in things])} have?"
    return f"Which {COUNTS[codes]}{'code' if codes == 1 else 'codes'} does the {things[0]} have?"


def box_question(number: str, boxes: int) -> str:
    return f"In which {COUNTS[boxes]}{'box' if boxes == 1 else 'boxes'} is {number}?"


def _niah(keys: int, values: int, queried: int) -> Callable[[random.Random, str, float | None], Draft]:
    """Needles "The code of the amber kettle is 48213.": `keys` things with `values` numbers each, `queried` in question."""

    def draw(rng: random.Random, _: str, depth: float | None) -> Draft:
        things, numbers = draw_things(rng, keys), draw_numbers(rng, keys * values)
        depths = rng.sample(_depths(rng, keys * values), keys * values)
        single = queried == values == 1
        if single:
            depths[0] = rng.random() if depth is None else depth
        facts = code_facts(things, numbers)
        needles = [(told(fact), at) for fact, at in zip(facts, depths, strict=True)]
        wanted = facts[: queried * values]
        prefix, target = asked(wanted)
        question, answers = code_question(things[:queried], values), tuple(number for _, number in wanted)
        body, place = _prose(rng, needles), depths[0] if single else None
        return Draft(CODES_INTRO, question, prefix, answers, target, body, place, needles)

    return draw


# -- variable tracking

CHAINS, HOPS = 2, 2


def _tracking(rng: random.Random, _: str, depth: float | None) -> Draft:
    """Numbers in boxes, and boxes in boxes, told from the inside outwards; the other chain is there to mislead."""
    size = HOPS + 1
    names, numbers = draw_names(rng, CHAINS * size), draw_numbers(rng, CHAINS)
    needles: list[Needle] = []
    for chain, number in enumerate(numbers):
        facts = box_facts(number, names[chain * size : (chain + 1) * size])
        needles += zip(map(told, facts), _depths(rng, size), strict=True)
    prefix, target = asked(box_facts(numbers[0], names[:size]))
    question, answers = box_question(numbers[0], size), tuple(names[:size])
    return Draft(BOXES_INTRO, question, prefix, answers, target, _prose(rng, needles), needles=needles)


# -- words that come up often


def _common_words(rng: random.Random, key: str, depth: float | None) -> Draft:
    """A fifth of the list are the five common words; the other four fifths are shared by all others, evenly."""
    words = rng.sample(NOUNS, len(NOUNS))
    common, others = words[:5], words[5:]

    def counts(units: int) -> tuple[int, int]:
        """How often each common word comes up, and how often an uncommon one at most."""
        often = max(2, round(0.2 * units / len(common)))
        return often, -(-max(0, units - often * len(common)) // len(others))

    def body(units: int) -> list[str]:
        often, _ = counts(units)
        rest = units - often * len(common)
        listed = common * often + [others[i % len(others)] for i in range(rest)]
        random.Random(f"{key}/{units}").shuffle(listed)
        return [f"This is the list: {', '.join(listed[:units])}."] if units else []

    return Draft(
        "At the market somebody read out a long list of words, and some of them again and again.",
        "Which five words come up most often in the list?",
        "The five words that come up most often in the list are",
        tuple(common),
        " " + listing(common),
        body,
        clear=lambda units: units >= 2 * len(common) and counts(units)[0] >= 2 * counts(units)[1],
    )


def _frequent_words(rng: random.Random, key: str, depth: float | None) -> Draft:
    """The word of rank r comes up in proportion to r ** -1.5; the more words, the more ranks."""
    words = rng.sample(CODED_WORDS, len(CODED_WORDS))

    def counts(units: int) -> list[int]:
        shares = [rank**-1.5 for rank in range(1, min(4 + units // 8, len(words)) + 1)]
        upto = [round(units * share / sum(shares)) for share in accumulate(shares, initial=0.0)]
        return [after - before for before, after in pairwise(upto)]

    def body(units: int) -> list[str]:
        sent = [word for word, count in zip(words, counts(units), strict=False) for _ in range(count)]
        random.Random(f"{key}/{units}").shuffle(sent)
        return [f"This is the message: {' '.join(sent)}."] if units else []

    def clear(units: int) -> bool:
        first, second, third, *others = counts(units)
        return first > second > third > max(others)

    return Draft(
        "A message came in a code that nobody could read, but some of its words came up more often than others.",
        "Which three words come up most often in the message?",
        "The three words that come up most often in the message are",
        tuple(words[:3]),
        " " + listing(words[:3]),
        body,
        clear=clear,
    )


TASKS: dict[str, Callable[[random.Random, str, float | None], Draft]] = {
    "niah_single": _niah(keys=1, values=1, queried=1),
    "niah_multikey": _niah(keys=4, values=1, queried=1),
    "niah_multivalue": _niah(keys=1, values=4, queried=1),
    "niah_multiquery": _niah(keys=4, values=1, queried=4),
    "vt": _tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
DEPTH_TASKS = ("niah_single", "niah_multikey")

"""What recall-mini is taught: its tokenizer, and lessons without end that ask about what they have told.

Letters: B batch rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from bench.quality import tasks
from bench.quality.prose import ADJECTIVES, CODED_WORDS, NOUNS, sentences
from bench.quality.tasks import TASKS, Fact

BOS, EOS = "<s>", "</s>"
LINES = 0.15  # share of lessons that are conversations


# -- tokenizer


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE that knows every word of the tasks whole, numbers by up to three digits, and can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_spellings(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _spellings() -> Iterator[str]:
    """Every word about as often as any other, so that the rare ones become tokens too."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    told_sentences = sentences(rng)
    for _ in range(20_000):
        words.update(dict.fromkeys(next(told_sentences).split()))
    for name, draw in TASKS.items():
        draft = draw(rng, name, None)
        words.update(dict.fromkeys(f"{draft.intro} {draft.question} {draft.answer_prefix} {draft.target}".split()))
    words.update(dict.fromkeys([*ADJECTIVES, *NOUNS, *CODED_WORDS, *(word.capitalize() for word in CODED_WORDS)]))
    for word in words:
        yield from [f" {word}"] * 20
    for number in range(1000):
        yield from [f" {number:03d}"] * 40
    for number in range(100):
        yield from [f" 100{number:02d}"] * 40


# -- lessons

# What a question asks for, and is scored as.
ASKS = ("repeats", "code", "codes of several", "several codes", "boxes", "common words", "frequent words")
COUNTED = ("common words", "frequent words")


@dataclass
class Lesson:
    """A context, and after it questions with their answers, as token ids.

    Attributes:
        ids: tokens.
        answer: parallel to ids: which question the token answers, -1 for none.
        asks: index into ASKS of every question.
    """

    ids: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    asks: list[int] = field(default_factory=list)

    def tell(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.answer += [-1] * len(ids)

    def wants(self, ids: Sequence[int], ask: str) -> None:
        self.ids += ids
        self.answer += [len(self.asks)] * len(ids)
        self.asks.append(ASKS.index(ask))


@dataclass(frozen=True)
class Ask:
    """A question about facts that the context tells."""

    kind: str
    question: str
    facts: list[Fact]


class Lessons:
    """Endless lessons, a function of the seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.encode = lru_cache(1 << 16)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        (self.bos,), (self.eos,), (self.stop,) = map(self.encode, (BOS, EOS, "."))
        self.prose = sentences(self.rng)

    def batch(self, rows: int, length: int, mix: Mapping[str, float], filler: float) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T+1] int64, and parallel to it `answer` (see Lesson) and `ask` (index into ASKS, -1), T = `length`."""
        ids, answer, ask = [], [], []
        for kind in self.rng.choices(list(mix), list(mix.values()), k=rows):
            lesson = KINDS[kind](self, length, self.rng.random() < filler)
            short = [-1] * (length + 1 - len(lesson.ids))
            ids.append((lesson.ids + [self.bos] * len(short))[: length + 1])
            answer.append((lesson.answer + short)[: length + 1])
            ask.append(([lesson.asks[i] if i >= 0 else -1 for i in lesson.answer] + short)[: length + 1])
        return torch.tensor(ids), torch.tensor(answer), torch.tensor(ask)

    def repeats(self, length: int, _: bool) -> Lesson:
        """A random sequence over and over: nothing helps but to copy what came after the same token before."""
        period = self.rng.randint(8, max(9, length // 2))
        once = self.rng.choices(range(2, self.tokenizer.get_vocab_size()), k=period)
        again = (once * (length // period + 1))[: length - period]
        lesson = Lesson()
        lesson.tell([*once, once[0]])
        lesson.wants([*again[1:], once[length % period]], "repeats")
        return lesson

    def codes(self, length: int, filler: bool) -> Lesson:
        """Things with codes: one is asked for, or those of several things, or the several codes of one thing."""
        rng = self.rng
        things = iter(tasks.draw_things(rng, rng.randint(2, min(24, max(3, length // 24)))))
        asks = []
        for thing in things:
            kind = rng.choices(ASKS[1:4], (3, 2, 2))[0]
            group = [thing, *islice(things, rng.randint(1, 3))] if kind == "codes of several" else [thing]
            values = rng.randint(2, 4) if kind == "several codes" else 1
            facts = tasks.code_facts(group, tasks.draw_numbers(rng, values * len(group)))
            asks.append(Ask(kind if len(facts) > 1 else "code", tasks.code_question(group, values), facts))
        return self._lesson(length, filler, tasks.CODES_INTRO, asks)

    def boxes(self, length: int, filler: bool) -> Lesson:
        """Numbers in boxes, and boxes in boxes."""
        rng = self.rng
        numbers = tasks.draw_numbers(rng, rng.randint(1, min(6, max(2, length // 80))))
        names = iter(tasks.draw_names(rng, 4 * len(numbers)))
        chains = [list(islice(names, rng.randint(1, 4))) for _ in numbers]
        asks = [
            Ask("boxes", tasks.box_question(number, len(boxes)), tasks.box_facts(number, boxes))
            for number, boxes in zip(numbers, chains, strict=True)
        ]
        return self._lesson(length, filler, tasks.BOXES_INTRO, asks)

    def _lesson(self, length: int, filler: bool, intro: str, asks: list[Ask]) -> Lesson:
        """The facts, between prose if wanted, and the questions: a random number of them, or as many as there is room for.

        Some lessons are conversations: sentences may begin a line, questions do, and the answer is a whole line.
        """
        rng = self.rng
        lines = rng.random() < LINES

        def encode(sentence: str) -> list[int]:
            return self.encode(("\n" if lines and rng.random() < 0.5 else " ") + sentence)

        lesson = Lesson()
        lesson.tell([self.bos, *self.encode(intro)])
        room = length + 1 - len(lesson.ids)
        most = rng.choice((1, 2, 4, 8, 16))
        facts: list[tuple[float, list[int]]] = []
        questions: list[tuple[list[int], list[int], str]] = []
        for number, ask in enumerate(asks):  # those that are not put are rivals to the others
            places = [rng.random() for _ in ask.facts]
            if ask.kind == "boxes":
                places.sort()
            told_ids = [encode(tasks.told(fact)) for fact in ask.facts]
            cost = sum(map(len, told_ids))
            if number < most:
                prefix, target = tasks.asked(ask.facts)
                if lines:
                    put = self.encode(f"\n{ask.question}\n"), self.encode(f"{prefix}{target}."), ask.kind
                else:
                    put = self.encode(f" {ask.question} {prefix}"), self.encode(f"{target}."), ask.kind
                cost += len(put[0]) + len(put[1]) + 1
            if cost > room and number:
                continue
            room -= cost
            facts += zip(places, told_ids, strict=True)
            if number < most:
                questions.append(put)
        facts.sort(key=lambda fact: fact[0])
        if filler:
            prose = []
            while (room := room - len(sentence := encode(next(self.prose)))) >= 0:
                prose.append(sentence)
            facts = [(i / max(1, len(prose)), sentence) for i, sentence in enumerate(prose)] + facts
            facts.sort(key=lambda fact: fact[0])
        for _, ids in facts:
            lesson.tell(ids)
        rng.shuffle(questions)
        for before, after, kind in questions:
            lesson.tell(before)
            lesson.wants([*after, self.eos], kind)
        return lesson

    def counts(self, length: int, _: bool) -> Lesson:
        """Common words or frequent words, as the tasks draw them."""
        name, ask, tokens = self.rng.choice((("cwe", "common words", 2), ("fwe", "frequent words", 1)))
        units = (length - 64) // tokens
        while not (draft := TASKS[name](self.rng, str(self.rng.random()), None)).clear(units):
            units -= 1  # some lengths leave two words with equal counts
        lesson = Lesson()
        text = f"{draft.context(units)} {draft.question} {draft.answer_prefix}"
        lesson.tell([self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids])
        lesson.wants([*self.encode(f"{draft.target}."), self.eos], ask)
        return lesson


KINDS: dict[str, Callable[[Lessons, int, bool], Lesson]] = {
    "repeats": Lessons.repeats,
    "codes": Lessons.codes,
    "boxes": Lessons.boxes,
    "counts": Lessons.counts,
}


def show(lessons: Lessons) -> None:
    for name, kind in KINDS.items():
        lesson = kind(lessons, 256, True)
        print(f"-- {name}: {len(lesson.ids)} tokens")
        for number, run in groupby(zip(lesson.answer, lesson.ids, strict=True), key=lambda pair: pair[0]):
            print(f"{number:3}", lessons.tokenizer.decode([token for _, token in run]))

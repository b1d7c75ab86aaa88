"""Documents with many questions: what a document's compressed cache has lost for each of them.

The right answers are teacher-forced, so that nothing has to be judged by its wording. Of every answer's tokens, on average,

    kl      KL(full || method), nats per token
    top1    share of tokens whose most likely successor is the same as with the full cache
    nll     negative log-likelihood of the answer, nats per token; full_nll: with the full cache

and of questions that offer letters which of them is the likeliest. "agnostic": the document alone is prefilled and evicted,
once, and every question is asked of a fork. "aware": document and question are evicted together, all but the prompt's last
token, which is read on what is left (bench/quality/choice.py says why). One prefill serves all methods and budgets.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.quality.distance import Judged, Told, force
from bench.quality.leval import CLOSING, Document, Question, choosing, encode, read_leval
from bench.report.documents import documents_parts
from bench.runs import schema as must
from bench.runs.benchmark import Benchmark, register
from bench.runs.folder import digest
from bench.runs.methods import Method, check, equal_bytes
from bench.runs.plans import Cell, at_least, cells_of, check_compression, compressed, modes_of
from bench.runs.rows import Row
from bench.runs.run import Batch, Work
from bench.runs.together import Held, answer_together, prefill_all
from restkv.errors import PromptError, RestKVWarning
from restkv.lm import LM
from restkv.policies import Policy
from restkv.session import Session

GOLD, OWN = 48, 24  # tokens of an answer, if nobody says otherwise
ANSWERS = {"gold": GOLD, "own": OWN}
SCORES = ("auto", "answer", "letters")


@dataclass(frozen=True)
class Asked:
    """A question's token ids.

    Attributes:
        index: which one of the document's it is.
        tail: what is appended to the evicted prompt.
        answer: what is teacher-forced; None: what the full cache says.
        letters: ids of the letters to choose from; label: the number of the right one.
    """

    index: int
    tail: list[int]
    answer: list[int] | None
    letters: tuple[int, ...] = ()
    label: int = 0


@dataclass(frozen=True)
class Read:
    """A document's token ids: what its prompts begin with, and its questions."""

    index: int
    prompt: list[int]
    questions: list[Asked]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(one.tail) + len(one.answer or ()) for one in self.questions)


@dataclass(frozen=True)
class DocumentsPlan:
    """The arguments of a run.

    Attributes:
        data: a file as bench/quality/leval.py reads it.
        methods: the full cache first, as parse_methods has them.
        compression: tokens of what is evicted over entries per KV head.
        question: aware, agnostic or both.
        answer: "gold": the answers of the file; "own": what the full cache itself says, greedily.
        answer_tokens: of an answer at most; None: GOLD or OWN.
        score: "answer": the likelihood of answers; "letters": also which letter is the likeliest, of those questions whose right
            answer is one; "auto": letters where every right answer is.
        limit: documents at most; questions: of each of them.
        max_tokens: documents whose longest prompt and answer have more are left out; None: the model's positions.
        chat: ask through the chat template.
    """

    data: Path
    methods: tuple[Method, ...]
    compression: tuple[float, ...]
    question: str = "agnostic"
    answer: str = "gold"
    answer_tokens: int | None = None
    score: str = "auto"
    limit: int | None = None
    questions: int | None = None
    max_tokens: int | None = None
    chat: bool = False
    kind: ClassVar[str] = "documents"

    def work(self, lm: LM) -> Work:
        """Document by document; the data are in the arguments as a hash. See bench.runs.run.Plan."""
        modes, plan = modes_of(self.question), _completed(self, lm)
        documents, score = plan.chosen()
        reads, left_out = plan.read(lm, documents, score)
        cells, shortest = cells_of(self.methods, self.compression), min(len(read.prompt) for read in reads)
        check_compression(self.compression, shortest)
        for cell in cells:
            what = f"{shortest} tokens at {cell.asked:g}x"
            check(lm, cell.method, compressed(cell.asked, shortest), shortest, what)
        batches = []
        for read in reads:
            for mode in modes:
                parts = [read] if mode == "agnostic" else _one_by_one(read)
                batches += [_batch(lm, part, mode, score, cells, plan) for part in parts]
        names = ("question", "answer", "answer_tokens", "limit", "questions", "max_tokens", "chat")
        arguments = {
            "data": digest(repr(documents)),
            "compression": list(self.compression),
            **{name: getattr(plan, name) for name in names},
            "score": score,
            "documents": len(reads),
            "left out": left_out,
            "evict": "prompt" if any(method.once for method in self.methods) else "always",
        }
        return Work(arguments, self.methods, compressed(min(self.compression), shortest), batches)

    def chosen(self) -> tuple[list[Document], str]:
        """The documents with the questions to be asked, and what is scored."""
        documents = read_leval(self.data)
        score = self.score
        if score == "auto":
            letters = all(question.chooses for document in documents for question in document.questions)
            score = "letters" if letters and self.answer == "gold" else "answer"
        if score == "letters":
            there = sum(len(document.questions) for document in documents)
            documents = [*choosing(documents)]
            some = sum(len(document.questions) for document in documents)
            if not some:
                raise PromptError(f"{self.data}: no answer is a letter that its question offers; give --score answer")
            if some < there:
                _remark(f"{there - some} of {there} questions have no answer of one letter and are left out")
        return [replace(one, questions=one.questions[: self.questions]) for one in documents], score

    def read(self, lm: LM, documents: Sequence[Document], score: str) -> tuple[list[Read], int]:
        """The documents that fit, and how many of those before the last of them do not."""
        assert self.max_tokens is not None
        reads: list[Read] = []
        left_out = 0
        for document in documents:
            if self.limit is not None and len(reads) == self.limit:
                break
            if len(lm.tokenizer.encode(document.text)) > self.max_tokens:  # before all its prompts are made
                left_out += 1
                continue
            read = _read(lm, document, self, score)
            room = 0 if self.answer == "gold" else self.answer_tokens or 0
            if read.longest + room > self.max_tokens:
                left_out += 1
            else:
                reads.append(read)
        if not reads:
            raise PromptError(f"{self.data}: every document has more than {self.max_tokens} tokens; raise --max-tokens")
        if left_out:
            _remark(f"{left_out} documents of more than {self.max_tokens} tokens are left out")
        return reads, left_out


def _remark(text: str) -> None:
    warnings.warn(text, RestKVWarning, stacklevel=4)


def _completed(plan: DocumentsPlan, lm: LM) -> DocumentsPlan:
    """The plan with its defaults, which are the model's.

    Raises:
        PromptError: it makes no sense.
    """
    if plan.answer not in ANSWERS:
        raise PromptError(f"answer {plan.answer!r} is not known; choose from {', '.join(ANSWERS)}")
    if plan.score not in SCORES:
        raise PromptError(f"score {plan.score!r} is not known; choose from {', '.join(SCORES)}")
    if plan.score == "letters" and plan.answer == "own":
        raise PromptError("score 'letters': the right letter is the file's; give --answer gold")
    if not plan.methods or not plan.methods[0].full:
        raise PromptError("the full cache is what all methods are compared with; put it first")
    plan = replace(
        plan,
        answer_tokens=ANSWERS[plan.answer] if plan.answer_tokens is None else plan.answer_tokens,
        max_tokens=lm.config.max_positions if plan.max_tokens is None else plan.max_tokens,
    )
    given = {name: 1 for name in ("limit", "questions") if getattr(plan, name) is not None}
    at_least(plan, answer_tokens=1, max_tokens=1, **given)
    return plan


def _read(lm: LM, document: Document, plan: DocumentsPlan, score: str) -> Read:
    texts = [question.text for question in document.questions]
    prompts = encode(lm.tokenizer, document.text, texts, CLOSING[score], plan.chat)
    asked = []
    for question, tail in zip(document.questions, prompts.questions, strict=True):
        letters, label = _letters(lm, question) if score == "letters" else ((), 0)
        answer = lm.encode_continuation(question.answer)[: plan.answer_tokens] if plan.answer == "gold" else None
        asked.append(Asked(question.index, lm.encode(tail), answer, letters, label))
    return Read(document.index, lm.encode(prompts.document), asked)


def _letters(lm: LM, question: Question) -> tuple[tuple[int, ...], int]:
    """Ids of the letters that a question offers, and which of them is the right one."""
    ids = [lm.encode_continuation(letter) for letter in question.letters]
    if any(len(one) != 1 for one in ids):
        raise PromptError("the model's tokenizer has letters of several tokens; give --score answer")
    return tuple(one[0] for one in ids), question.letters.index(question.answer)


def _one_by_one(read: Read) -> list[Read]:
    """Each question with a prompt of its own, all but whose last token is evicted."""
    parts = []
    for asked in read.questions:
        whole = read.prompt + asked.tail
        parts.append(Read(read.index, whole[:-1], [replace(asked, tail=whole[-1:])]))
    return parts


def _batch(lm: LM, read: Read, mode: str, score: str, cells: Sequence[Cell], plan: DocumentsPlan) -> Batch:
    keys = [f"{mode}/{read.index}/{asked.index}/{cell.key}" for asked in read.questions for cell in cells]
    return Batch(keys, partial(_rows, lm, read, mode, score, cells, plan.answer_tokens or GOLD))


def _rows(lm: LM, read: Read, mode: str, score: str, cells: Sequence[Cell], tokens: int) -> list[Row]:
    counts = [compressed(cell.asked, len(read.prompt)) for cell in cells]
    policies = [
        equal_bytes(lm, cell.method, count, lambda: read.prompt) for cell, count in zip(cells, counts, strict=True)
    ]
    held, found = compare_all(lm, policies, read.prompt, read.questions, tokens)
    rows = []
    for asked, measured in zip(read.questions, found, strict=True):
        about = {"part": score, "question": mode, "document": read.index, "index": asked.index}
        place = {"tokens": len(read.prompt), "prompt": digest(repr(read.prompt + asked.tail))}
        for cell, count, policy, has, measures in zip(cells, counts, policies, held, measured, strict=True):
            rows.append(cell.row(count, policy, has, about, {**place, **measures}))
    return rows


# -- measuring


@torch.no_grad()
def compare_all(
    lm: LM, policies: Sequence[Policy], prompt: Sequence[int], questions: Sequence[Asked], tokens: int
) -> tuple[list[Held], list[list[dict[str, Any]]]]:
    """Prefill a prompt once and evict it under each policy; compare every answer with that of the first, the full cache.

    Args:
        tokens: of an answer that the full cache gives.
    Returns:
        What each policy kept of the prompt; for every question what was measured under each policy.
    """
    assert policies[0].budget is None, "the first is what all are compared with"
    later = max(len(asked.tail) + len(asked.answer or range(tokens)) for asked in questions)
    groups = answer_together(lm, policies, len(prompt), later, extends=True)
    prefill_all(lm, groups, prompt)
    held: dict[int, Held] = {}
    for group in groups:
        held |= zip(group.about, group.held(), strict=True)
    found = []
    for asked in questions:
        answer = own_answer(lm, groups[0].session, asked.tail, tokens) if asked.answer is None else asked.answer
        told = Told(torch.tensor(answer, device=lm.device), asked.letters)
        force(groups[0].session, asked.tail, answer, [told])
        measured: dict[int, dict[str, Any]] = {}
        for group in groups:
            judged = [Judged(told) for _ in group.policies]
            if group is groups[0]:
                judged[0].see(0, told.log_TV)
            else:
                force(group.session, asked.tail, answer, judged)
            measured |= {about: _measures(asked, one) for about, one in zip(group.about, judged, strict=True)}
        found.append([measured[index] for index in range(len(policies))])
    for group in groups:
        group.session.cache.free()
    return [held[index] for index in range(len(policies))], found


def _measures(asked: Asked, judged: Judged) -> dict[str, Any]:
    """As a row has them; all but those of letters are means over the answer's tokens."""
    found = {"answer_tokens": len(judged.full.answer_T), **judged.measures()}
    if judged.letters:
        logprobs = [round(value, 6) for value in judged.letters]
        choice = logprobs.index(max(logprobs))
        said = {"choice": choice, "label": asked.label, "score": float(choice == asked.label)}
        found |= {"logprobs": logprobs, **said}
    return found


def own_answer(lm: LM, session: Session, tail: Sequence[int], tokens: int) -> list[int]:
    """What a session's only row says to a question, greedily: so many tokens, or fewer and one that ends the answer."""
    fork = session.fork(len(tail) + tokens)
    said: list[int] = []
    try:
        fork.extend([tail])
        while True:
            said.append(int(fork.logits_BV[0].argmax()))  # sync: the answer's tokens are fed again, by all
            if len(said) == tokens or said[-1] in lm.config.eos_token_ids:
                return said
            fork.feed(torch.tensor(said[-1:], device=lm.device))
    finally:
        fork.cache.free()


ANSWER: must.Fields = {
    "question": must.MODE,
    "document": must.whole(),
    "index": must.whole(),
    "tokens": must.whole(1),
    "answer_tokens": must.whole(1),
    "asked": must.number(1),
    "top1": must.SCORE,
    **{name: must.number() for name in ("kl", "nll", "full_nll")},
}
LETTERS: must.Fields = {**ANSWER, "score": must.SCORE}
ARGUMENTS: must.Fields = {
    "compression": must.many(must.number(1), 1),
    "answer": must.one_of(*ANSWERS),
    "score": must.one_of(*SCORES[1:]),
}
register(
    Benchmark(
        "documents",
        "Documents with many questions",
        documents_parts,
        {"answer": ANSWER, "letters": LETTERS},
        ARGUMENTS,
    )
)

"""Documents with many questions each, as L-Eval has them (An et al. 2023, arXiv 2307.11088): one JSON object a line.

    {"input": the document, "instructions": [its questions], "outputs": [their right answers], ...}

The files are the user's (GPL-3.0, their texts under licences of their own; no part of restkv).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.quality.tasks import parted
from bench.runs.jsonl import Row, text_rows
from modeling.text.characters import fault
from modeling.text.tokenizer import Tokenizer
from restkv.errors import PromptError

CHOICE = re.compile(r"^\(?([A-Z])[.):]", re.MULTILINE)  # a line of a question that begins with the letter of an answer
CLOSING = {"answer": "Answer shortly.", "letters": "Answer with one letter."}


@dataclass(frozen=True)
class Question:
    """A question and its right answer.

    Attributes:
        index: which one of the document's it is.
    """

    index: int
    text: str
    answer: str

    @property
    def letters(self) -> list[str]:
        """Those it offers to choose from, each once."""
        return list(dict.fromkeys(CHOICE.findall(self.text)))

    @property
    def chooses(self) -> bool:
        """Whether its right answer is one of several letters that it offers."""
        return self.answer in self.letters and len(self.letters) > 1


@dataclass(frozen=True)
class Document:
    """A text with its questions.

    Attributes:
        index: which row of the file it is.
    """

    index: int
    text: str
    questions: tuple[Question, ...]


def read_leval(path: Path) -> list[Document]:
    """The documents of a file, in its order; empty lines are passed over.

    Raises:
        PromptError: the file cannot be read, or a row is not as it should be (its line is named).
    """
    documents = [_document(index, row) for index, (_, row) in enumerate(text_rows(path))]
    if not documents:
        raise PromptError(f"{path}: has no rows; give a file of L-Eval's, or one like it")
    return documents


def _document(index: int, row: Row) -> Document:
    text, asked, right = row.text("input").strip(), row.texts("instructions"), row.texts("outputs")
    if not text:
        raise PromptError(f"{row.place}: no text in input; mend or delete the row")
    if not asked:
        raise PromptError(f"{row.place}: no questions in instructions; mend or delete the row")
    if len(asked) != len(right):
        raise PromptError(
            f"{row.place}: {len(asked)} instructions and {len(right)} outputs; give every question its answer"
        )
    for name, texts in (("instructions", asked), ("outputs", right)):
        for number, one in enumerate(texts, 1):
            if not one.strip() or fault(one):
                raise PromptError(
                    f"{row.place}: number {number} of {name} {fault(one) or 'has no text'}; mend or delete it"
                )
    pairs = enumerate(zip(asked, right, strict=True))
    return Document(index, text, tuple(Question(number, one.strip(), said.strip()) for number, (one, said) in pairs))


@dataclass(frozen=True)
class Prompts:
    """A document's prompts as token ids: what all of them begin with, and what each goes on with."""

    document: list[int]
    questions: list[list[int]]


def encode(tokenizer: Tokenizer, text: str, questions: Sequence[str], closing: str, chat: bool) -> Prompts:
    """The prompts of a document's questions: a turn of the user's that holds the document, an empty line, the question and
    `closing`; without `chat`, plain text of the same shape, the answer on a line of its own.

    Whole prompts are encoded, so that a document and a question joined are exactly what a tokenizer makes of their text. They
    are cut where all of them still agree with each other and with the encoding of what stands before the questions alone: a token
    that reaches over that place belongs to the questions.

    Raises:
        PromptError: the template does not show the message as it is.
    """
    start: list[int] | None = None
    wholes = []
    for question in questions:
        asked = f"Question: {question}\n{closing}"
        message = f"{text}\n\n{asked}"
        shown = tokenizer.render([{"role": "user", "content": message}]) if chat else f"{message}\n"
        at = shown.rfind(message)
        if at < 0:
            raise PromptError(
                "the chat template does not show a message as it is, so that a document cannot be told from its question; "
                "give --no-chat"
            )
        wholes.append(tokenizer.encode(shown, bos=not chat))
        if start is None:
            start = tokenizer.encode(shown[: at + len(message) - len(asked)], bos=not chat)
        start = parted(wholes[-1], start)[0]
    assert start is not None, "a document has questions"
    return Prompts(start, [whole[len(start) :] for whole in wholes])


def choosing(documents: Sequence[Document]) -> Iterator[Document]:
    """The documents with those of their questions whose right answer is a letter."""
    for document in documents:
        some = tuple(question for question in document.questions if question.chooses)
        if some:
            yield Document(document.index, document.text, some)

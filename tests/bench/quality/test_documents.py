"""Documents with many questions: how they are read and cut, and what answers lose, against a twin that reads token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import restkv
from bench.quality.documents import Asked, compare_all
from bench.quality.leval import Document, Question, choosing, encode, read_leval
from make.lines import jsonl
from make.small import small_ids, small_model
from make.template_folders import folder_with
from make.toy_tokenizers import KINDS, TOKENS
from modeling.layers import Decoder
from modeling.text.tokenizer import Tokenizer
from restkv.errors import NumericError, PromptError
from restkv.lm import LM
from restkv.policies import FullCache, Policy
from restkv.testing.models import exact
from twins.stepwise import Row

MODEL: dict[str, Any] = {"seed": 3, "windows": (None, 23, None)}
PROMPT = small_ids(40, seed=1)
QUESTIONS = [
    Asked(0, small_ids(5, seed=2), small_ids(7, seed=3)),
    Asked(2, small_ids(1, seed=4), small_ids(1, seed=5), letters=(3, 5, 8), label=1),
    Asked(3, small_ids(9, seed=6), None),
]
OWN = 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(small_model(**MODEL), None)


@pytest.fixture(scope="module")
def twin() -> Decoder:
    return exact(small_model(**MODEL))


# -- what answers lose


@torch.no_grad()
def slow(twin: Decoder, policy: Policy, prompt: Sequence[int], tail: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] before each token of an answer, in float64: the question is read at once, the answer by tokens."""
    row = Row(twin, policy)
    row.prefill(prompt)
    logits = [row.extend(tail, len(tail)), *(row.feed(token) for token in answer[:-1])]
    return torch.stack([line.double() for line in map(torch.atleast_1d, logits)]).flatten(1).log_softmax(-1)


def slow_answer(twin: Decoder, tail: Sequence[int]) -> list[int]:
    answer: list[int] = []
    for _ in range(OWN):
        answer.append(int(slow(twin, FullCache(), PROMPT, tail, [*answer, 0])[-1].argmax()))
    return answer


POLICIES: list[Policy] = [
    FullCache(),
    restkv.SnapKV(budget=12, window=4, interval=None),
    restkv.ReSTKV(budget=12, window=4, budget_by="uniform", interval=None),
    restkv.SnapKV(budget=9, window=3, granularity="query", interval=None),
    restkv.H2O(budget=8, interval=None),
    restkv.StreamingLLM(budget=9, interval=None),
    restkv.SnapKV(budget=12, window=4, interval=100),
    restkv.SnapKV(budget=12, window=4, interval=6),  # evicts within two of the answers
    restkv.TOVA(budget=9, interval=1),
    restkv.SnapKV(budget=len(PROMPT), window=4, interval=None),
]


def test_distances_are_those_of_reading_token_by_token(lm: LM, twin: Decoder) -> None:
    held, found = compare_all(lm, POLICIES, PROMPT, QUESTIONS, OWN)
    assert [round(one.kept) for one in held] == [40, 12, 12, round(held[3].kept), 8, 9, 12, 12, 9, 40]
    for asked, measured in zip(QUESTIONS, found, strict=True):
        answer = asked.answer or slow_answer(twin, asked.tail)
        ids_T1 = torch.tensor(answer)[:, None]
        full_TV = slow(twin, FullCache(), PROMPT, asked.tail, answer)
        for policy, has in zip(POLICIES, measured, strict=True):
            log_TV = slow(twin, policy, PROMPT, asked.tail, answer)
            assert has["answer_tokens"] == len(answer)
            assert has["kl"] == pytest.approx(float((full_TV.exp() * (full_TV - log_TV)).sum(-1).mean()), abs=2e-5)
            assert has["nll"] == pytest.approx(-float(log_TV.gather(1, ids_T1).mean()), abs=2e-5)
            assert has["full_nll"] == pytest.approx(-float(full_TV.gather(1, ids_T1).mean()), abs=2e-5)
            assert has["top1"] == pytest.approx(float((log_TV.argmax(-1) == full_TV.argmax(-1)).double().mean()))
            assert ("score" in has) == bool(asked.letters)
            if asked.letters:
                said = log_TV[0, list(asked.letters)]
                assert has["logprobs"] == pytest.approx(said.tolist(), abs=5e-5)
                assert (has["choice"], has["label"]) == (int(said.argmax()), 1)
                assert has["score"] == float(int(said.argmax()) == 1)
        assert measured[0]["kl"] == 0 and measured[0]["top1"] == 1
        assert measured[-1]["kl"] == pytest.approx(0, abs=1e-9)  # whatever keeps all of the prompt
    assert len({round(has["kl"], 3) for has in found[0]}) > 5 and all(has["kl"] > 1e-3 for has in found[0][1:5])


def test_a_question_leaves_the_document_as_it_was(lm: LM) -> None:
    """Neither other questions nor other policies change what is measured."""
    _, together = compare_all(lm, POLICIES, PROMPT, QUESTIONS, OWN)
    _, backwards = compare_all(lm, POLICIES, PROMPT, QUESTIONS[::-1], OWN)
    assert backwards[::-1] == together
    for number, policy in enumerate(POLICIES[1:], 1):
        (_, held), alone = compare_all(lm, [FullCache(), policy], PROMPT, QUESTIONS[:1], OWN)
        assert alone[0][1] == pytest.approx(together[0][number], abs=2e-5)
        assert held.kept > 0


def test_an_own_answer_ends_where_the_model_ends_it(lm: LM) -> None:
    (asked,) = QUESTIONS[2:]
    _, ((whole,),) = compare_all(lm, [FullCache()], PROMPT, [asked], OWN)
    assert whole["answer_tokens"] == OWN
    likeliest = int(lm.logits(PROMPT + asked.tail)[-1].argmax())
    ending = LM(small_model(**MODEL, eos_token_ids=(likeliest,)), None)
    _, ((short,),) = compare_all(ending, [FullCache()], PROMPT, [asked], OWN)
    assert short["answer_tokens"] == 1 and short["nll"] < whole["nll"] * OWN


def test_a_vocabulary_may_be_padded(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With logits of -inf for what is no token, as some families have; the others' distributions stay as they are."""
    real, asked, policies = Decoder.head, Asked(0, [1, 2], [3, 5, 4]), POLICIES[:2]

    def padded(self: Decoder, x: Tensor) -> Tensor:
        logits = real(self, x)
        return torch.cat([logits, torch.full_like(logits[..., :3], -torch.inf)], -1)

    _, want = compare_all(lm, policies, PROMPT, [asked], OWN)
    monkeypatch.setattr(Decoder, "head", padded)
    _, found = compare_all(lm, policies, PROMPT, [asked], OWN)
    assert found[0][1] == pytest.approx(want[0][1], abs=1e-9)


def test_numbers_that_are_none_end_a_run() -> None:
    lm = LM(small_model(**MODEL), None)
    lm.model.embed_tokens.weight[21] = float("nan")
    asked = Asked(0, [1, 2], [3, 21, 4])
    prompt = [token for token in PROMPT if token != 21]
    with pytest.raises(NumericError):
        compare_all(lm, [FullCache(), restkv.SnapKV(budget=12, window=4)], prompt, [asked], OWN)


# -- prompts


TEXT = "Once upon a time there was a girl named Lily. 12€\n  She loved the park"
ASKED = ["Who was there?", "What did she love?", "12€?", "Who"]


@pytest.mark.parametrize("chat", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_and_its_question_are_the_tokens_of_the_whole_prompt(kind: str, chat: bool) -> None:
    tokenizer = Tokenizer(KINDS[kind](), TOKENS, CHATML, "here")
    prompts = encode(tokenizer, TEXT, ASKED, "Answer shortly.", chat)
    for question, tail in zip(ASKED, prompts.questions, strict=True):
        message = f"{TEXT}\n\nQuestion: {question}\nAnswer shortly."
        whole = tokenizer.chat([{"role": "user", "content": message}]) if chat else tokenizer.encode(f"{message}\n")
        assert prompts.document + tail == whole
        assert "uestion" not in tokenizer.decode(prompts.document) and "uestion" in tokenizer.decode(tail)
    assert "loved the par" in tokenizer.decode(prompts.document)


def test_a_token_over_the_end_of_the_document_belongs_to_the_questions() -> None:
    """As of a tokenizer that joins an empty line and what follows it."""

    class Joins(Tokenizer):
        def __init__(self) -> None:
            pass

        def encode(self, text: str, bos: bool = True) -> list[int]:
            return [1] * bos + [ord(letter) for letter in text.replace("\n\nQ", "\u2603")]

    prompts = encode(Joins(), "ab", ["x", "y"], "Go.", chat=False)
    assert prompts.document == [1, ord("a"), ord("b")] and all(tail[0] == 0x2603 for tail in prompts.questions)


def test_a_template_that_alters_messages_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"chat_template.jinja": "{{ messages[0].content | upper }}"})
    with pytest.raises(PromptError, match=r"the chat template does not show a message as it is, .* give --no-chat"):
        encode(Tokenizer.from_folder(folder), TEXT, ASKED, "Answer shortly.", chat=True)


# -- files


def test_rows_are_documents_with_questions(tmp_path: Path) -> None:
    one = {"input": " A text. ", "instructions": ["Why?\nA. a\nB. b", "Who?"], "outputs": ["B", " Tom\n"], "source": 3}
    two = {"input": "Another.", "instructions": "When?", "outputs": "Now"}
    documents = read_leval(jsonl(tmp_path / "x.jsonl", one, "", two))
    choice = Question(0, "Why?\nA. a\nB. b", "B")
    assert documents == [
        Document(0, "A text.", (choice, Question(1, "Who?", "Tom"))),
        Document(1, "Another.", (Question(0, "When?", "Now"),)),
    ]
    assert choice.letters == ["A", "B"] and choice.chooses
    assert [*choosing(documents)] == [Document(0, "A text.", (choice,))]
    for text, answer in (("Why?\nA. a\nB. b", "AB"), ("Why?\nA. a", "A"), ("Why?\nA) a\n(B) b", "C"), ("A or B?", "A")):
        assert not Question(0, text, answer).chooses
    assert Question(0, "Why?\n(A) a\nB) b\nC: c", "C").chooses


GOOD = {"input": "x", "instructions": ["a", "b"], "outputs": ["c", "d"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[]", r"\[\] is not an object with fields"),
        ({"instructions": [], "outputs": []}, "no field 'input'; the row has instructions, outputs"),
        ({**GOOD, "input": ["x"]}, r"""field 'input' is \["x"\], not text"""),
        ({**GOOD, "input": " \n"}, "no text in input"),
        ({**GOOD, "outputs": [1, 2]}, r"field 'outputs' is \[1, 2\], neither text nor a list of texts"),
        ({**GOOD, "instructions": [], "outputs": []}, "no questions in instructions"),
        ({**GOOD, "outputs": ["c"]}, "2 instructions and 1 outputs; give every question its answer"),
        ({**GOOD, "outputs": ["c", " "]}, "number 2 of outputs has no text"),
        ({**GOOD, "instructions": ["a\ud800", "b"]}, r"number 1 of instructions has '\\ud800' at place 1"),
    ],
)
def test_odd_rows_are_named_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(PromptError, match=rf"x\.jsonl, line 3: {message}"):
        read_leval(jsonl(tmp_path / "x.jsonl", GOOD, "", row))


def test_files_without_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"x\.jsonl: has no rows"):
        read_leval(jsonl(tmp_path / "x.jsonl", ""))
    with pytest.raises(PromptError, match=r"none\.jsonl: cannot be read"):
        read_leval(tmp_path / "none.jsonl")

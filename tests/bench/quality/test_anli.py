"""ANLI: the prompts are lm-eval's, worked examples come from the training rows, odd rows are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.quality.anli import anli_items, read_examples
from bench.quality.choice import encode, told_items
from bench.quality.tasks import Frame, make_sample
from make.lines import jsonl
from modeling.text.tokenizer import Tokenizer
from restkv.cli.options import RECALL
from restkv.errors import PromptError

# -- ANLI


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(RECALL)


@pytest.fixture
def anli(tmp_path: Path) -> Path:
    """The published archive in small: the field is called context, uid and reason are there."""
    for number in (1, 2, 3):
        folder = tmp_path / "anli_v1.0" / f"R{number}"
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [
                {
                    "uid": f"{split}-{number}-{index}",
                    "context": f"Premise {index} of {split}.",
                    "hypothesis": f"Hypothesis {index}.",
                    "label": "enc"[index],
                    "model_label": "n",
                    "emturk": False,
                    "reason": "because",
                }
                for index in range(3)
            ]
            jsonl(folder / f"{split}.jsonl", *rows)
    return tmp_path


def test_prompts_are_lm_evals(anli: Path) -> None:
    items = anli_items(anli)
    assert [(item.task, item.index, item.label) for item in items] == [
        (f"R{number}", index, index) for index in range(3) for number in (1, 2, 3)
    ]
    assert anli_items(anli / "anli_v1.0") == items
    first = items[0]
    assert first.context + first.question == (
        "Premise 0 of test.\nQuestion: Hypothesis 0. True, False, or Neither?\nAnswer:"
    )
    assert first.choices == (" True", " Neither", " False") and first.context == "Premise 0 of test."
    assert [item.name for item in anli_items(anli, (2,), "dev", limit=2)] == ["dev-2-0", "dev-2-1"]
    some = anli_items(anli, (2,), "dev", shots=1, fraction=0.7)
    assert some == anli_items(anli, (2,), "dev", shots=1)[:2]  # rows 0 and 3 // 2, the same whichever others are run


def test_worked_examples_come_from_the_rounds_training_rows(anli: Path) -> None:
    (item,) = anli_items(anli, (3,), shots=3, limit=1)
    shots = item.context.split("\n\n")
    assert shots.pop() == "Premise 0 of test."
    answers = {0: "True", 1: "Neither", 2: "False"}
    assert sorted(shots) == [
        f"Premise {i} of train.\nQuestion: Hypothesis {i}. True, False, or Neither?\nAnswer: {answers[i]}"
        for i in range(3)
    ]
    assert anli_items(anli, (3,), shots=3, limit=1) == [item]
    orders = {anli_items(anli, (3,), shots=3, limit=1, seed=seed)[0].context for seed in range(9)}
    assert len(orders) > 1
    own = anli_items(anli, (1,), "train", shots=2)
    assert all(item.context.count(f"Premise {item.index} ") == 1 for item in own)  # its own row is no example


def test_the_name_of_the_readme_is_taken_too_and_empty_lines_are_none(tmp_path: Path) -> None:
    row = {"premise": "Ünïcode\u2028premise", "hypothesis": "h", "label": "c"}
    (example,) = read_examples(jsonl(tmp_path / "x.jsonl", "", row, ""))
    assert (example.uid, example.premise, example.hypothesis, example.label) == ("2", row["premise"], "h", "c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", r"\[\] is not an object with fields"),
        ('{"hypothesis": "h", "label": "e"}', "no field 'premise'; the row has hypothesis, label"),
        ('{"context": " ", "hypothesis": "h", "label": "e"}', "no text in premise or hypothesis"),
        ('{"context": "p", "hypothesis": ["h"], "label": "e"}', r"""field 'hypothesis' is \["h"\], not text"""),
        ('{"context": "p", "hypothesis": "h"}', "no field 'label'; the row has context, hypothesis"),
        ('{"context": "p", "hypothesis": "h", "label": 0}', "field 'label' is 0, not text"),
        ('{"context": "p", "hypothesis": "h", "label": "x"}', "label 'x' is none of e, n, c"),
    ],
)
def test_odd_rows_of_anli_are_named_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    good = {"context": "p", "hypothesis": "h", "label": "e"}
    with pytest.raises(PromptError, match=rf"x\.jsonl, line 3: {message}"):
        read_examples(jsonl(tmp_path / "x.jsonl", good, good, line))


def test_data_that_are_not_there_are_named(anli: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": tmp_path / "elsewhere"}, "elsewhere: has no folder R1; name the folder anli_v1.0"),
        ({"rounds": (1, 4)}, "rounds 1, 4: ANLI has 1, 2, 3"),
        ({"split": "valid"}, "split 'valid' is not known; choose from train, dev, test"),
        ({"shots": 4}, "R1: 4 shots asked for, 3 training rows to draw from"),
        ({"shots": -1}, "shots -1: give at least 0"),
        ({"limit": 0}, "limit 0: give at least 1"),
        ({"fraction": 1.5}, "fraction 1.5: give a number above 0, at most 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(PromptError, match=message):
            anli_items(**{"data": anli, **arguments})
    (anli / "anli_v1.0" / "R2" / "test.jsonl").unlink()
    with pytest.raises(PromptError, match=r"R2/test\.jsonl: cannot be read"):
        anli_items(anli)
    jsonl(anli / "anli_v1.0" / "R2" / "test.jsonl")
    with pytest.raises(PromptError, match=r"R2/test\.jsonl: has no rows"):
        anli_items(anli)


def test_an_items_tokens_are_those_of_its_text(anli: Path, tokenizer: Tokenizer) -> None:
    for item in anli_items(anli, shots=1, limit=1):
        ids = encode(tokenizer, item)
        assert ids.context + ids.question == tokenizer.encode(item.context + item.question)
        for choice, text in zip(ids.choices, item.choices, strict=True):
            assert ids.context + ids.question + choice == tokenizer.encode(item.context + item.question + text)
        assert ids.split("aware") == (ids.context + ids.question[:-1], ids.question[-1:])
        assert ids.split("agnostic") == (ids.context, ids.question)


def test_told_items_offer_the_right_value_and_two_others_of_the_same_context(tokenizer: Tokenizer) -> None:
    items = told_items(tokenizer, 160, 6, seed=2)
    assert [(item.task, item.index) for item in items] == [(t, i) for i in range(6) for t in ("codes", "boxes")]
    assert told_items(tokenizer, 160, 6, seed=2) == items
    for item in items:
        right = item.choices[item.label]
        stem = item.question.rsplit("? ", 1)[1]
        assert f"{stem}{right}." in item.context
        assert len(set(item.choices)) == 3
        for choice in item.choices:
            assert choice.startswith(" ") and f"is{choice}." in item.context
            assert (f"{stem}{choice}." in item.context) == (choice == right)
    assert len({item.label for item in items}) > 1
    sample = make_sample("niah_multikey", 160, 2, 0, Frame(tokenizer))
    assert items[0].context == sample.context and items[0].choices[items[0].label] == f" {sample.answers[0]}"

"""Runs of `restkv bench documents`: rows, tables, what is left out, refusals, the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import restkv
from bench.quality import documents
from bench.quality.documents import DocumentsPlan
from bench.report.kinds import parts, progress
from bench.report.page import markdown
from bench.report.tables import Table
from bench.runs.folder import SAMPLES, read_manifest, read_rows
from bench.runs.methods import parse_methods
from bench.runs.run import run
from bench.runs.together import Together, prefill_all
from make.lines import jsonl
from restkv.cli import main
from restkv.cli.options import RECALL
from restkv.errors import PolicyError, PromptError, RestKVWarning

METHODS = tuple(parse_methods("restkv:window=4,streamingllm", once=True))
STORY = (RECALL / "story.txt").read_text(encoding="utf-8")
CHOICE = "Which hat is it?\nA. the red one\nB. the blue one\nC. none"


def row(number: int, length: int = 400) -> dict[str, Any]:
    start = 500 * number
    return {
        "input": STORY[start : start + length],
        "instructions": ["Who is there?", f"What is number {number}?"],
        "outputs": ["Tom is there, and so are Lily and the old dog.", "a red kite"],
    }


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "x.jsonl", row(0), row(1))


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    asked = [CHOICE, "Why?\n(A) so\n(B) because"]
    return jsonl(tmp_path / "letters.jsonl", {**row(0), "instructions": asked, "outputs": ["B", "A"]})


def tables(folder: Path) -> list[Table]:
    manifest, rows = read_manifest(folder), read_rows(folder)
    return [part for part in parts("documents", manifest["arguments"], rows) if isinstance(part, Table)]


def test_a_run_has_a_row_of_every_question_and_cell(lm: restkv.LM, data: Path, tmp_path: Path) -> None:
    plan = DocumentsPlan(data, METHODS, (4.0, 8.0), "both", answer_tokens=5)
    folder = run(lm, plan, tmp_path / "run")
    rows = read_rows(folder)
    assert len(rows) == 2 * 2 * 2 * (1 + 2 * 2)
    assert progress("documents", read_manifest(folder)["arguments"], rows) == (40, 40)
    for one in rows:
        assert one["key"].startswith(f"{one['question']}/{one['document']}/{one['index']}/{one['method']}/")
        assert one["answer_tokens"] == (5 if one["index"] == 0 else one["answer_tokens"]) <= 5
        assert one["part"] == "answer" and "score" not in one and one["bytes"] > 0
        if one["method"] == "full":
            assert (one["kl"], one["top1"], one["asked"], one["kept"]) == (0, 1, 1.0, one["tokens"])
            assert one["nll"] == pytest.approx(one["full_nll"])
        else:
            assert one["entries"] == round(one["tokens"] / one["asked"]) and one["kl"] > 0
            assert one["kept"] <= one["entries"]
    by_mode = {mode: [one for one in rows if one["question"] == mode] for mode in ("aware", "agnostic")}
    assert {one["tokens"] for one in by_mode["agnostic"]} < {one["tokens"] for one in rows}
    firsts = {mode: next(one for one in some if one["method"] == "full") for mode, some in by_mode.items()}
    assert firsts["aware"]["full_nll"] == pytest.approx(firsts["agnostic"]["full_nll"], abs=1e-4)  # of the same text

    captions = [table.caption for table in tables(folder)]
    assert captions[0].startswith("KL(full || method) of the right answers, question in sight")
    assert any(caption.startswith("KL of restkv:window=4 minus that of the others") for caption in captions)
    kl, cells, differences, *_ = tables(folder)
    assert kl.columns == ["method", "4x", "8x"] and [line[0] for line in kl.lines] == [m.label for m in METHODS[1:]]
    assert [line[:2] for line in cells.lines][:2] == [["full", "1x"], ["restkv:window=4", "4x"]]
    assert {line[-1] for line in cells.lines} == {"4"} and cells.lines[0][3] == "1.000"
    assert [line[0] for line in differences.lines] == ["streamingllm"]
    assert captions[0] in markdown(folder)


def test_a_document_is_compressed_once_for_all_its_questions(
    lm: restkv.LM, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Sequence[int]] = []

    def counted(lm: restkv.LM, groups: Sequence[Together], ids: Sequence[int]) -> None:
        prompts.append(ids)
        prefill_all(lm, groups, ids)

    monkeypatch.setattr(documents, "prefill_all", counted)
    plan = DocumentsPlan(data, METHODS, (4.0, 8.0), answer_tokens=2)
    run(lm, plan, tmp_path / "agnostic")
    assert len(prompts) == 2
    run(lm, replace(plan, question="aware"), tmp_path / "aware")
    assert len(prompts) == 2 + 4 and all(len(ids) > len(prompts[0]) for ids in prompts[2:4])


def test_own_answers_are_what_the_full_cache_says(lm: restkv.LM, data: Path, tmp_path: Path) -> None:
    folder = run(lm, DocumentsPlan(data, METHODS, (4.0,), answer="own", answer_tokens=3, limit=1), tmp_path / "run")
    for one in read_rows(folder):
        assert one["answer_tokens"] <= 3 and one["document"] == 0
        if one["method"] == "full":
            assert one["nll"] < 3  # it says what is likeliest
    assert "the full cache's own answers" in markdown(folder)


def test_letters_are_chosen_by_their_likelihood(lm: restkv.LM, letters: Path, tmp_path: Path) -> None:
    folder = run(lm, DocumentsPlan(letters, METHODS, (4.0,)), tmp_path / "run")
    rows = read_rows(folder)
    assert read_manifest(folder)["arguments"]["score"] == "letters" and len(rows) == 2 * 3
    for one in rows:
        assert len(one["logprobs"]) == (3 if one["index"] == 0 else 2) and one["label"] == 1 - one["index"]
        assert one["logprobs"][one["label"]] == pytest.approx(-one["nll"], abs=1e-5)
        assert one["score"] == float(one["logprobs"].index(max(one["logprobs"])) == one["label"])
    cells = next(table for table in tables(folder) if "accuracy [95 %]" in table.columns)
    right = [one["score"] for one in rows if one["method"] == "full"]
    assert cells.lines[0][cells.columns.index("accuracy [95 %]")].startswith(f"{sum(right) / 2:.3f} [")
    answers = run(lm, DocumentsPlan(letters, METHODS, (4.0,), score="answer"), tmp_path / "answers")
    assert all(one["part"] == "answer" and one["answer_tokens"] == 1 for one in read_rows(answers))


def test_questions_without_a_letter_are_left_out_where_letters_are_asked_for(lm: restkv.LM, tmp_path: Path) -> None:
    mixed = jsonl(tmp_path / "x.jsonl", row(0), {**row(1), "instructions": [CHOICE, "Why?"], "outputs": ["C", "so"]})
    plan = DocumentsPlan(mixed, METHODS, (4.0,), answer_tokens=1)
    assert {one["part"] for one in read_rows(run(lm, plan, tmp_path / "auto"))} == {"answer"}
    with pytest.warns(RestKVWarning, match="3 of 4 questions have no answer of one letter and are left out"):
        folder = run(lm, replace(plan, score="letters"), tmp_path / "letters")
    assert {(one["document"], one["index"]) for one in read_rows(folder)} == {(1, 0)}


def test_long_documents_are_left_out_and_counted(lm: restkv.LM, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "x.jsonl", row(0, 900), row(1), row(2, 4000), row(3), row(4))
    plan = DocumentsPlan(data, METHODS, (4.0,), limit=2, questions=1, max_tokens=200, answer_tokens=2)
    with pytest.warns(RestKVWarning, match="^2 documents of more than 200 tokens are left out"):
        folder = run(lm, plan, tmp_path / "run")
    assert {(one["document"], one["index"]) for one in read_rows(folder)} == {(1, 0), (3, 0)}
    arguments = read_manifest(folder)["arguments"]
    assert (arguments["documents"], arguments["left out"], arguments["max_tokens"]) == (2, 2, 200)
    with pytest.raises(PromptError, match=r"x\.jsonl: every document has more than 20 tokens; raise --max-tokens"):
        run(lm, replace(plan, max_tokens=20), tmp_path / "none")


CASES: list[tuple[dict[str, Any], str]] = [
    ({"question": "maybe"}, "question 'maybe' is not known"),
    ({"answer": "silver"}, "answer 'silver' is not known; choose from gold, own"),
    ({"score": "words"}, "score 'words' is not known; choose from auto, answer, letters"),
    ({"score": "letters", "answer": "own"}, "score 'letters': the right letter is the file's; give --answer gold"),
    ({"score": "letters"}, r"x\.jsonl: no answer is a letter that its question offers; give --score answer"),
    ({"methods": METHODS[1:]}, "the full cache is what all methods are compared with; put it first"),
    ({"compression": (0.5,)}, "compression 0.5: the prompt over what is kept"),
    ({"limit": 0}, "limit 0: give at least 1"),
    ({"questions": 0}, "questions 0: give at least 1"),
    ({"answer_tokens": 0}, "answer_tokens 0: give at least 1"),
    ({"chat": True}, "has no chat template"),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_plans_without_sense_are_refused(
    lm: restkv.LM, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plan = replace(DocumentsPlan(data, METHODS, (4.0,)), **changes)
    with pytest.raises(restkv.RestKVError, match=message):
        run(lm, plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_that_a_method_cannot_work_with_is_refused(lm: restkv.LM, data: Path, tmp_path: Path) -> None:
    plan = DocumentsPlan(data, tuple(parse_methods("restkv:window=90")), (4.0,))
    with pytest.raises(PolicyError, match=r"restkv:window=90: \d+ entries per head \(\d+ tokens at 4x\)"):
        run(lm, plan, tmp_path / "run")


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["bench", "documents", str(RECALL), "--data", str(data), "--methods", "restkv", "--out", str(out)]
    more = ["--compression", "4,8", "--questions", "1", "--evict", "always", "--answer-tokens", "3"]
    assert main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert "KL(full || method) of the right answers, context compressed before the question" in said
    results = (out / SAMPLES).read_bytes()
    assert results.count(b"\n") == 2 * 3 and read_manifest(out)["arguments"]["evict"] == "always"
    (out / SAMPLES).write_bytes(results[:500])
    assert main([*command, *more]) == 0
    assert (out / SAMPLES).read_bytes() == results
    assert main(["bench", "report", str(out), "--json"]) == 0
    assert '"documents"' in capsys.readouterr().out
    assert main([*command, *more, "--no-chat", "--limit", "1"]) == 2
    assert "limit" in capsys.readouterr().err
    data.write_text("{}\n")
    assert main(command) == 2
    assert "x.jsonl, line 1: no field 'input'; the row has none at all" in capsys.readouterr().err

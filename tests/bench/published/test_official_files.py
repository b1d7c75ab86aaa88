"""Files of the published benchmarks: all tasks are read, odd rows refused by file and line, templates never run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import restkv
from bench.published import wording
from bench.published.haystack import BUFFER, haystack, insert
from bench.published.haystack import HASHES as NEEDLE_HASHES
from bench.published.infinitebench import TASKS as INFINITEBENCH_TASKS
from bench.published.infinitebench import infinitebench
from bench.published.longbench import TASKS as LONGBENCH_TASKS
from bench.published.longbench import longbench
from bench.published.ruler import NEW_TOKENS as RULER_TASKS
from bench.published.ruler import ruler
from bench.published.suite import OFFICIAL, PAPER, Suite
from bench.published.templates import OWN, RECOGNISED, UNKNOWN, Template, find_templates, sha12
from bench.runs.jsonl import DataError, Rows
from make.official_files import (
    STORY,
    infinitebench_row,
    longbench_row,
    ruler_row,
    write_essays,
    write_infinitebench,
    write_infinitebench_clone,
    write_jsonl,
    write_longbench,
    write_longbench_clone,
    write_needle_clone,
    write_ruler,
)
from restkv.cli.options import RECALL
from restkv.errors import PromptError

LONGBENCH_HASHES = {name: digest for name, (_, _, digest) in LONGBENCH_TASKS.items()}
INFINITEBENCH_HASHES = {name: rule.template for name, rule in INFINITEBENCH_TASKS.items()}


@pytest.fixture(scope="module")
def lm() -> restkv.LM:
    return restkv.load(RECALL)


def tasks(suite: Suite) -> dict[str, Any]:
    return {source.task.name: source.task for source in suite.sources}


# -- every task


def test_longbench_as_its_repository_runs_it(lm: restkv.LM, tmp_path: Path) -> None:
    suite = longbench(lm, write_longbench(tmp_path), None, OFFICIAL, None)
    known = tasks(suite)
    assert list(known) == list(LONGBENCH_TASKS) and len(known) == 16
    assert all(source.count == 2 and source.wording == OWN for source in suite.sources)
    assert {name for name, task in known.items() if not task.chat} == {
        "trec", "triviaqa", "samsum", "lcc", "repobench-p",
    }  # fmt: skip
    assert [name for name, task in known.items() if task.newline_ends or task.least_one] == ["samsum"]
    assert {name: task.max_new_tokens for name, task in known.items()} == {
        "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32,
        "gov_report": 512, "qmsum": 512, "multi_news": 512, "trec": 64, "triviaqa": 32, "samsum": 128, "passage_count": 32,
        "passage_retrieval_en": 32, "lcc": 64, "repobench-p": 64,
    }  # fmt: skip
    for source in suite.sources:
        item = source.item(1)
        assert STORY * 2 in item.prompt and item.place.endswith(f"{source.task.name}.jsonl: line 2")
        assert item.answers == longbench_row(source.task.name)["answers"]
    assert suite.eos == lm.config.eos_token_ids and suite.max_length == 7500  # of 8,192 positions


def test_longbench_as_the_paper_runs_it(lm: restkv.LM, tmp_path: Path) -> None:
    suite = longbench(lm, write_longbench(tmp_path), ["samsum", "hotpotqa"], PAPER, None)
    assert list(tasks(suite)) == ["samsum", "hotpotqa"] and suite.max_length == 7950
    assert all(task.least_one and not task.chat and not task.newline_ends for task in tasks(suite).values())
    assert suite.eos == lm.tokenizer.eos_ids


def test_infinitebench_in_both_ways(lm: restkv.LM, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    write_infinitebench(tmp_path)
    official, paper = (infinitebench(lm, tmp_path, None, protocol, None) for protocol in (OFFICIAL, PAPER))
    assert len(tasks(official)) == 12
    assert {name: task.max_new_tokens for name, task in tasks(official).items()} == {
        "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_sum_eng": 1200, "longbook_choice_eng": 40,
        "longbook_qa_eng": 40, "longbook_qa_chn": 40, "longdialogue_qa_eng": 40, "math_find": 3, "math_calc": 30000,
        "code_run": 5, "code_debug": 5,
    }  # fmt: skip
    changed = {
        n: t.max_new_tokens for n, t in tasks(paper).items() if t.max_new_tokens != tasks(official)[n].max_new_tokens
    }
    assert changed == {"passkey": 15, "number_string": 20, "kv_retrieval": 80}
    items = {source.task.name: source.item(0) for source in official.sources}
    assert (
        items["longbook_choice_eng"].answers == ["big_dog", "B"]
        and "\nB. big_dog\n" in items["longbook_choice_eng"].prompt
    )
    assert items["code_debug"].answers == ["park", "C"]
    assert items["code_run"].answers == [-2] and "func_7(-2)" in items["code_run"].prompt
    assert items["math_find"].prompt.startswith("What is the largest number in the following list?")
    assert items["math_calc"].answers == [[1, 3, 2]]
    assert "她看见了什么" in items["longbook_qa_chn"].prompt
    right = {"math_calc": "1, 3, 2", "code_run": "-2", "code_debug": "C", "longbook_choice_eng": "B", "math_find": "3"}
    for source in official.sources:
        item = source.item(0)
        said = right.get(source.task.name, str(item.answers[0]))
        assert source.task.metric(said, item.answers, item.classes) == 1, source.task.name
    assert (official.max_length, paper.max_length) == (8192, 7950)


def test_ruler_in_both_layouts(lm: restkv.LM, tmp_path: Path) -> None:
    write_ruler(tmp_path)
    official, paper = (ruler(lm, tmp_path, None, None, protocol) for protocol in (OFFICIAL, PAPER))
    assert [len(tasks(suite)) for suite in (official, paper)] == [13, 11]
    assert {source.length for source in official.sources} == {128, 256}
    assert {task.max_new_tokens for task in tasks(paper).values()} == {64} and paper.max_length == 7950
    new = {name: task.max_new_tokens for name, task in tasks(official).items() if not name.startswith("niah")}
    assert new == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} and official.max_length is None
    prompts = {source.item(0).prompt for source in official.sources}
    assert prompts == {STORY * 3 + "What is it? Answer: it is"}  # the prefix, apart or not, once
    some = ruler(lm, tmp_path, ["vt"], [256], OFFICIAL)
    assert [(s.task.name, s.length) for s in some.sources] == [("vt", 256)]
    scored = {s.task.name: s.task.metric("71432 and Paris", s.item(0).answers, ()) for s in official.sources}
    assert scored["vt"] == 1 / 2 and scored["qa_1"] == 1


def test_the_needle_lies_after_a_full_stop_and_the_length_is_kept(lm: restkv.LM, tmp_path: Path) -> None:
    suite = haystack(lm, write_essays(tmp_path), [280, 300], 10, PAPER, None)
    depths = [0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1]
    assert [source.depth for source in suite.sources] == 2 * depths
    needle = wording.NEEDLE["needle"]
    assert suite.sources[0].item(0).answers == [needle, "to ride the old yellow tram up to the castle at dusk."]
    words = lm.tokenizer
    assert words is not None
    places = []
    for source in suite.sources[10:]:
        prompt = source.item(0).prompt
        before, found, after = prompt.partition(needle)
        assert found and wording.NEEDLE["retrieval_question"] in after
        told = before.partition("<book> ")[2]
        assert told == "" or told.endswith(".") or source.depth == 1
        places.append(len(told))
    assert places[0] == 0 and places == sorted(places) and places[-1] > places[5] > 0
    hay = words.encode(STORY * 20, bos=False)
    inserted = insert(words, hay, words.encode(needle, bos=False), 300, 50)
    assert len(words.encode(inserted, bos=False)) == pytest.approx(300 - BUFFER, abs=2)
    task = suite.sources[0].task
    assert task.newline_ends and task.max_new_tokens == 30 and not task.least_one


# -- odd rows


def test_odd_rows_that_are_read(lm: restkv.LM, tmp_path: Path) -> None:
    rows = [
        longbench_row("hotpotqa") | {"answers": []},
        longbench_row("hotpotqa") | {"answers": "one text"},
        longbench_row("hotpotqa") | {"answers": [""], "context": "Ünïcode\u2028 {braces} — 北京 🎈"},
    ]
    path = write_jsonl(tmp_path / "hotpotqa.jsonl", rows)
    path.write_text("\n" + path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")  # blank lines
    (source,) = longbench(lm, tmp_path, None, OFFICIAL, None).sources
    items = [source.item(index) for index in range(source.count)]
    assert [item.answers for item in items] == [[], ["one text"], [""]]
    assert "Ünïcode\u2028 {braces} — 北京 🎈" in items[2].prompt and items[2].place.endswith("line 6")
    assert [source.task.metric("one text", item.answers, ()) for item in items] == [0, 1, 0]


def change(**fields: Any) -> Callable[[dict], dict]:
    return lambda row: row | fields


def drop(name: str) -> Callable[[dict], dict]:
    return lambda row: {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("kind", "task", "edit", "message"),
    [
        ("longbench", "qasper", drop("answers"), "no field 'answers'; the row has input, context, length"),
        ("longbench", "qasper", change(input=3), "field 'input' is 3, not text"),
        ("longbench", "qasper", change(answers=[1]), r"field 'answers' is \[1\], neither text nor a list of texts"),
        ("longbench", "trec", change(all_classes=None), "field 'all_classes' is null, neither"),
        ("longbench", "passage_retrieval_en", change(answers=["2"]), "answer '2' names no paragraph"),
        ("infinitebench", "passkey", drop("context"), "no field 'context'"),
        ("infinitebench", "passkey", change(answer=[]), "field 'answer' is an empty list"),
        ("infinitebench", "code_run", change(input="call it"), "field 'input' has no call such as"),
        ("infinitebench", "code_run", change(answer=["2"]), r"answer \['2'\]: give int, or a list of it"),
        ("infinitebench", "math_find", change(input="largest?"), "field 'input' has no number to find"),
        ("infinitebench", "code_debug", change(options=["a"]), "field 'options' has 1 entries; there have to be 4"),
        ("infinitebench", "code_debug", change(answer="tree"), r"answer \['tree'\] is none of the options"),
        ("ruler", "vt", drop("outputs"), "no field 'outputs'"),
        ("ruler", "vt", change(answer_prefix=7), "field 'answer_prefix' is 7, not text"),
    ],
)
def test_odd_rows_are_refused_by_file_and_line(
    kind: str, task: str, edit: Callable[[dict], dict], message: str, lm: restkv.LM, tmp_path: Path
) -> None:
    make = {"longbench": longbench_row, "infinitebench": infinitebench_row, "ruler": ruler_row}[kind]
    path = tmp_path / ("128" if kind == "ruler" else "") / f"{task}.jsonl"
    write_jsonl(path, [make(task), edit(make(task, 1))])
    with pytest.raises(DataError, match=f"{path.name}: line 2: {message}"):
        if kind == "ruler":
            ruler(lm, tmp_path, None, None, OFFICIAL)
        else:
            {"longbench": longbench, "infinitebench": infinitebench}[kind](lm, tmp_path, None, OFFICIAL, None)


def test_every_field_of_every_task_is_missed_by_file_line_and_name(lm: restkv.LM, tmp_path: Path) -> None:
    fields: dict[str, dict[str, tuple[str, ...]]] = {
        "longbench": dict.fromkeys(LONGBENCH_TASKS, ("input", "context", "answers")),
        "infinitebench": dict.fromkeys(INFINITEBENCH_TASKS, ("input", "context", "answer")),
        "ruler": dict.fromkeys(RULER_TASKS, ("input", "outputs")),
    }
    fields["longbench"]["trec"] += ("all_classes",)
    for task in ("longbook_choice_eng", "code_debug"):
        fields["infinitebench"][task] += ("options",)
    make = {"longbench": longbench_row, "infinitebench": infinitebench_row, "ruler": ruler_row}
    count = 0
    for kind, task, name in ((k, t, f) for k, tasks in fields.items() for t, names in tasks.items() for f in names):
        place = tmp_path / f"{kind}-{task}-{name}"
        path = place / ("128" if kind == "ruler" else "") / f"{task}.jsonl"
        write_jsonl(path, [make[kind](task), drop(name)(make[kind](task, 1))])
        with pytest.raises(DataError, match=f"^{path}: line 2: no field '{name}'; the row has "):
            if kind == "ruler":
                ruler(lm, place, [task], None, OFFICIAL)
            else:
                {"longbench": longbench, "infinitebench": infinitebench}[kind](lm, place, [task], OFFICIAL, None)
        count += 1
    assert count == 16 * 3 + 1 + 12 * 3 + 2 + 13 * 2


def test_files_that_are_none_are_refused(lm: restkv.LM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of any task, such as narrativeqa.jsonl"):
        longbench(lm, tmp_path, None, OFFICIAL, None)
    with pytest.raises(DataError, match="task 'lsht' is not known; choose from narrativeqa, "):
        longbench(lm, tmp_path, ["lsht"], OFFICIAL, None)
    with pytest.raises(DataError, match=r"lcc.jsonl: cannot be read \(No such file"):
        longbench(lm, tmp_path, ["lcc"], OFFICIAL, None)
    (tmp_path / "lcc.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"lcc.jsonl: has no rows"):
        longbench(lm, tmp_path, ["lcc"], OFFICIAL, None)
    (tmp_path / "lcc.jsonl").write_text('{"input": 1}\n{broken\n')
    with pytest.raises(DataError, match=r"lcc.jsonl: line 2: not JSON"):
        list(Rows(tmp_path / "lcc.jsonl"))
    (tmp_path / "lcc.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"line 1: \[1\] is not an object"):
        longbench(lm, tmp_path, ["lcc"], OFFICIAL, None)
    with pytest.raises(PromptError, match="protocol 'mine' is not known; choose from official, restkv-paper"):
        longbench(lm, tmp_path, None, "mine", None)
    with pytest.raises(DataError, match="no subfolder named by a length"):
        ruler(lm, tmp_path, None, None, OFFICIAL)
    with pytest.raises(DataError, match="no subfolder 4096"):
        ruler(lm, tmp_path, None, [4096], OFFICIAL)
    with pytest.raises(DataError, match=r"no \*.txt with text"):
        haystack(lm, tmp_path, [1000], 10, PAPER, None)
    write_essays(tmp_path)
    with pytest.raises(PromptError, match="length 210: 200 tokens are left free"):
        haystack(lm, tmp_path, [210], 10, PAPER, None)


# -- templates


def test_templates_come_from_a_clone_and_are_never_run(lm: restkv.LM, tmp_path: Path) -> None:
    """The stand-in files would end the process if they were run, or imported."""
    data = write_longbench(tmp_path / "longbench")
    clone = write_longbench_clone(
        tmp_path / "clone", dict.fromkeys(LONGBENCH_TASKS, "Text: {context} Q: {input} {{A}}:")
    )
    suite = longbench(lm, data, ["qasper"], OFFICIAL, clone)
    assert suite.sources[0].wording == UNKNOWN
    assert suite.sources[0].item(0).prompt == f"Text: {STORY} Q: What did Lily see, number 0? {{A}}:"
    write_jsonl(tmp_path / "infinite" / "passkey.jsonl", [infinitebench_row("passkey")])
    book = infinitebench(
        lm, tmp_path / "infinite", None, OFFICIAL, write_infinitebench_clone(tmp_path / "infinite-clone")
    )
    assert book.sources[0].wording == UNKNOWN and STORY in book.sources[0].item(0).prompt
    needle = haystack(
        lm, write_essays(tmp_path / "essays"), [280], 2, PAPER, write_needle_clone(tmp_path / "needle-clone")
    )
    item = needle.sources[1].item(0)
    assert item.answers == ["\nThe way home is past the old mill.\n", "past the old mill."]
    assert item.prompt.startswith("A book: ") and item.prompt.endswith("{so}.\nQ: The way home is: \nA:")
    scripts = tmp_path / "scripts"  # as in the paper's code: a dictionary in the script that runs the benchmark
    scripts.mkdir()
    (scripts / "run_longbench.py").write_text("lengths = {'qasper': 128}\ntexts = {'qasper': '{context} {input}'}\n")
    (scripts / "run_infinite_bench.py").write_text("TEXTS = {'passkey': '{context} {input}'}\n")
    assert longbench(lm, data, ["qasper"], PAPER, scripts).sources[0].item(0).prompt.startswith(STORY)
    assert infinitebench(lm, tmp_path / "infinite", None, PAPER, scripts).sources[0].item(0).prompt.startswith(STORY)
    assert needle.facts["templates"] is not None and suite.facts["templates"] != book.facts["templates"]


def test_published_texts_are_recognised_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "This is it: {context}"
    path = tmp_path / "prompts.py"
    path.write_text(f"old = {{'lcc': 'other {{context}}'}}\nnew = {{'lcc': {known!r}}}\n")
    found, digest = find_templates("longbench", path, {"lcc": sha12(known)}, {})
    assert found["lcc"] == Template("lcc", known, RECOGNISED) and digest is not None
    with pytest.raises(DataError, match="several texts for 'lcc', none of them known"):
        find_templates("longbench", path, {"lcc": "0" * 12}, {})


def test_the_hashes_are_those_of_the_sources() -> None:
    text = (Path(restkv.__file__).parents[1] / "docs" / "sources.md").read_text(encoding="utf-8")
    listed = [
        LONGBENCH_HASHES,
        INFINITEBENCH_HASHES,
        {k: NEEDLE_HASHES[k] for k in ("needle", "retrieval_question")},
    ]
    for table in listed:
        for name, digest in table.items():
            assert digest in text, name
    assert set(wording.LONGBENCH) == set(LONGBENCH_TASKS) and set(wording.INFINITEBENCH) == set(INFINITEBENCH_TASKS)
    own = {
        sha12(text) for text in (*wording.LONGBENCH.values(), *wording.INFINITEBENCH.values(), *wording.NEEDLE.values())
    }
    known = {*LONGBENCH_HASHES.values(), *INFINITEBENCH_HASHES.values(), *NEEDLE_HASHES.values()}
    assert own & known == {INFINITEBENCH_HASHES["math_find"]}  # three fields and line breaks: there is no wording in it


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{", "neither JSON nor Python"),
        ("x.json", "[1]", r"neither JSON nor Python \(not an object\)"),
        ("x.py", "def", "neither JSON nor Python"),
        ("x.json", "{}", "has no template 'lcc'"),
        (
            "x.json",
            '{"lcc": "{context} {nothing}"}',
            r"template 'lcc': there is no field {nothing}; it may have context, input",
        ),
        ("x.json", '{"lcc": "{context.__class__}"}', "there is no field {context.__class__}"),
        ("x.json", '{"lcc": "{context"}', "template 'lcc': .* double the braces"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        found, _ = find_templates("longbench", path, {"lcc": LONGBENCH_HASHES["lcc"]}, {})
        found["lcc"].fill({"context": "c", "input": "i"})
    with pytest.raises(DataError, match=r"no dataset2prompt.json or run_longbench.py in this folder"):
        find_templates("longbench", tmp_path, LONGBENCH_HASHES, {})
    with pytest.raises(DataError, match="cannot be read"):
        find_templates("longbench", tmp_path / "none.json", LONGBENCH_HASHES, {})


def test_rows_are_read_where_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"n": n, "text": "é" * n} for n in range(5)])
    rows = Rows(path)
    assert [rows[n].values["n"] for n in (4, 0, 2)] == [4, 0, 2] and len(rows) == 5
    assert rows.digest == Rows(path).digest != Rows(write_jsonl(tmp_path / "y.jsonl", [json.loads("{}")])).digest

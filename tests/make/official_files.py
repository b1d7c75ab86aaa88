"""Small files in the exact formats of the published benchmarks, and stand-ins for their clones; all texts are our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.published import wording
from bench.published.infinitebench import TASKS as INFINITEBENCH_TASKS
from bench.published.longbench import TASKS as LONGBENCH_TASKS
from bench.published.ruler import NEW_TOKENS as RULER_TASKS

CLASSES = ["Place", "Number of days", "Number"]
STORY = "Lily went to the park. She saw a red ball and a big dog. "


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def longbench_row(task: str, number: int = 0) -> dict[str, Any]:
    answers = {
        "trec": ["Place"],
        "passage_count": ["7"],
        "passage_retrieval_en": ["Paragraph 2"],
        "lcc": ["return x"],
        "repobench-p": ["return x"],
    }.get(task, ["a red ball", "the ball"])
    return {
        "input": f"What did Lily see, number {number}?",
        "context": STORY * (number % 3 + 1),
        "answers": answers,
        "length": 40,
        "dataset": task,
        "language": "python" if task in ("lcc", "repobench-p") else "en",
        "all_classes": CLASSES if task == "trec" else None,
        "_id": f"{task}-{number}",
    }


def write_longbench(folder: Path, rows: int = 2, tasks: Sequence[str] = tuple(LONGBENCH_TASKS)) -> Path:
    for task in tasks:
        write_jsonl(folder / f"{task}.jsonl", [longbench_row(task, number) for number in range(rows)])
    return folder


def infinitebench_row(task: str, number: int = 0) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": number,
        "context": STORY * 2,
        "input": "What did she see?",
        "answer": ["ball"],
        "options": [],
    }
    options = ["red_ball", "big_dog", "park", "Lily"]
    special: dict[str, dict[str, Any]] = {
        "passkey": {"answer": ["71432"]},
        "number_string": {"answer": ["0012345678"]},
        "kv_retrieval": {"answer": ["ab-12-cd"]},
        "longbook_sum_eng": {"answer": ["Lily sees a ball."]},
        "longbook_choice_eng": {"options": options, "answer": ["big_dog"]},
        "longbook_qa_chn": {
            "input": "她看见了什么？",
            "context": "莉莉去了公园。她看见一个红球。",
            "answer": ["红球", "一个红球"],
        },
        "longdialogue_qa_eng": {"answer": ["LILY"]},
        "math_find": {"input": "The largest number of these is", "context": "[3, 1, 2]", "answer": [3]},
        "math_calc": {"context": "1 + 2 - 1", "answer": [[1, 3, 2]]},
        "code_run": {"input": "What is func_7(-2)?", "context": "def func_7(x):\n    return x", "answer": [-2]},
        "code_debug": {"context": "def park(): retrun 1", "options": options, "answer": "park"},
    }
    return row | special.get(task, {})


def write_infinitebench(folder: Path, rows: int = 2) -> Path:
    for task in INFINITEBENCH_TASKS:
        write_jsonl(folder / f"{task}.jsonl", [infinitebench_row(task, number) for number in range(rows)])
    return folder


def ruler_row(task: str, number: int = 0, prefix_apart: bool = True) -> dict[str, Any]:
    outputs = ["Paris", "London"] if task.startswith("qa") else ["71432", "red"]
    row = {"index": number, "input": STORY * 3 + "What is it?", "outputs": outputs, "length": 64}
    prefix = " Answer: it is"
    if prefix_apart:
        return row | {"length_w_model_temp": 70, "answer_prefix": prefix}
    return row | {"input": f"{row['input']}{prefix}"}


def write_ruler(folder: Path, lengths: Sequence[int] = (128, 256), rows: int = 1) -> Path:
    """The newer layout at the first length, the flat one of older files at the others."""
    for length in lengths:
        newer = length == lengths[0]
        for task in RULER_TASKS:
            name = f"data/{task}/validation.jsonl" if newer else f"{task}.jsonl"
            write_jsonl(folder / str(length) / name, [ruler_row(task, n, prefix_apart=newer) for n in range(rows)])
    return folder


def write_essays(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "b.txt").write_text("One day a bird sat in a tree. It sang. " * 4, encoding="utf-8")
    (folder / "a.txt").write_text(STORY * 3, encoding="utf-8")
    return folder


# -- clones of the benchmarks' repositories, with texts of our own where theirs would be


def write_longbench_clone(folder: Path, texts: Mapping[str, str] = wording.LONGBENCH) -> Path:
    path = folder / "LongBench" / "config" / "dataset2prompt.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(texts)), encoding="utf-8")
    return folder


def write_infinitebench_clone(folder: Path) -> Path:
    lines = [f"    {name!r}: {text!r},  # noqa" for name, text in wording.INFINITEBENCH.items()]
    source = "import no_such_module\nraise SystemExit('run')\ntemplates = {\n" + "\n".join(lines) + "\n}\n"
    path = folder / "src" / "prompt.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    return folder


def write_needle_clone(folder: Path) -> Path:
    source = (
        "class Tester:\n"
        "    def __init__(self, needle='\\nThe way home is past the old mill.\\n', haystack_dir='x',\n"
        "                 retrieval_question='The way home is: ', version=1):\n"
        "        raise SystemExit('run')\n"
        "    def prompt(self, context):\n"
        "        return f'A book: {context} {{so}}.\\nQ: {self.retrieval_question}\\nA:'\n"
    )
    folder.mkdir(parents=True)
    (folder / "run_needle_in_haystack.py").write_text(source, encoding="utf-8")
    return folder

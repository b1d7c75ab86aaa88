"""RULER's own files (docs/sources.md §4.1): index, input, outputs, length, and answer_prefix where the generator is a newer one.

Prompts are in the files, chat template and all, made for the target model's tokenizer by RULER's own generator. A folder has one
subfolder per length, as DIR/4096/{task}.jsonl, DIR/4096/{task}/validation.jsonl or DIR/4096/data/{task}/validation.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.published.metrics import found_all, found_any
from bench.published.suite import PAPER, Item, Source, Suite, Task, check_protocol, choose, end_ids, longest_prompt
from bench.runs.jsonl import DataError, Row
from restkv.lm import LM

KIND = "ruler-official"
WORDING = "in the data files"
NEEDLES = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery"
).split()
NEW_TOKENS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
ANY = ("qa_1", "qa_2")  # one answer is enough
PAPER_TASKS = [name for name in NEW_TOKENS if name not in ANY]
PAPER_NEW_TOKENS = 64


def ruler(lm: LM, folder: Path, names: Sequence[str] | None, lengths: Sequence[int] | None, protocol: str) -> Suite:
    """The benchmark on a folder of files that RULER's generator made.

    Args:
        names: tasks; None takes all that there are files of (under the paper's protocol without questions and answers).
        lengths: None takes all that there are subfolders of.
    """
    check_protocol(protocol)
    known = PAPER_TASKS if protocol == PAPER else list(NEW_TOKENS)
    there = sorted(int(sub.name) for sub in folder.iterdir() if sub.name.isdigit()) if folder.is_dir() else []
    if missing := [length for length in lengths or () if length not in there]:
        raise DataError(f"{folder}: no subfolder {missing[0]} with files of that length")
    if not there:
        raise DataError(f"{folder}: no subfolder named by a length, such as {folder / '4096'}; make one per length")
    sources, digests = [], {}
    for length in lengths or there:
        place = folder / str(length)
        for name, rows in choose(names, {name: _file(place, name) for name in known}, place).items():
            tokens = PAPER_NEW_TOKENS if protocol == PAPER else NEW_TOKENS[name]
            task = Task(name, found_any if name in ANY else found_all, tokens, least_one=protocol == PAPER)
            sources.append(Source.of(task, rows, _item, WORDING, length))
            digests[f"{length}/{name}"] = rows.digest
    longest = longest_prompt(lm, PAPER) if protocol == PAPER else None
    return Suite(KIND, protocol, tuple(sources), longest, end_ids(lm, protocol), {"files": digests})


def _file(folder: Path, name: str) -> Path:
    """Where the task's file is; where it might be, if there is none."""
    places = (folder / f"{name}.jsonl", folder / name / "validation.jsonl", folder / "data" / name / "validation.jsonl")
    return next((place for place in places if place.exists()), places[0])


def _item(row: Row) -> Item:
    """Newer generators keep the beginning of the answer apart from the input; it belongs to the prompt."""
    prefix = "" if row.values.get("answer_prefix") is None else row.text("answer_prefix")
    prompt = row.text("input")
    return Item(prompt if prompt.endswith(prefix) else prompt + prefix, row.texts("outputs"), row.place)

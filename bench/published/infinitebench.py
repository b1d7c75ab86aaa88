"""InfiniteBench (docs/sources.md §4.4): DIR/{task}.jsonl with id, context or content, input, answer, options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.published import infinite_metrics, wording
from bench.published.data import DataError, Row, Rows
from bench.published.metrics import rouge_version
from bench.published.suite import (
    OFFICIAL,
    PAPER,
    Item,
    Source,
    Suite,
    Task,
    check_protocol,
    choose,
    end_ids,
    longest_prompt,
)
from bench.published.templates import INFINITEBENCH, Template, find_templates
from restkv.lm import LM

KIND = "infinitebench"
OFFICIAL_LENGTH = 131072  # tokens of prompt
LETTERS = "ABCD"
CHOICES = ("longbook_choice_eng", "code_debug")
NEW_TOKENS = {  # official
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longdialogue_qa_eng": 40,
    "math_find": 3,
    "math_calc": 30000,
    "code_run": 5,
    "code_debug": 5,
}
PAPER_NEW_TOKENS = NEW_TOKENS | {"passkey": 15, "number_string": 20, "kv_retrieval": 80}
NUMBERS = {"math_find": (int, float), "math_calc": (int, list), "code_run": (int,)}  # types of their labels


def infinitebench(lm: LM, folder: Path, names: Sequence[str] | None, protocol: str, templates: Path | None) -> Suite:
    """The benchmark on a folder of its files.

    Args:
        names: tasks; None takes all that there are files of.
        templates: a clone of its repository, or the Python file with the templates; None takes our own wording.
    Raises:
        DataError: a file, row or template that is not as it should be (all rows are looked at). PromptError: rouge-score is
            missing for longbook_sum_eng.
    """
    check_protocol(protocol)

    def path(name: str) -> Path:
        return folder / f"{name}.jsonl"

    names = choose(names, list(NEW_TOKENS), lambda name: path(name) if path(name).exists() else None, folder)
    texts, digest = find_templates(
        KIND, templates, {name: INFINITEBENCH[name] for name in names}, wording.INFINITEBENCH
    )
    files = {name: Rows(path(name)) for name in names}
    sources = []
    for name, rows in files.items():
        for row in rows:
            _item(name, texts[name], row)
        sources.append(_source(name, protocol, texts[name], rows))
    longest = longest_prompt(lm, PAPER) if protocol == PAPER else min(OFFICIAL_LENGTH, lm.config.max_positions)
    facts = {"files": {name: rows.digest for name, rows in files.items()}, "templates": digest}
    if "longbook_sum_eng" in names:
        facts |= rouge_version()
    return Suite(KIND, protocol, tuple(sources), longest, end_ids(lm, protocol), facts, joined=protocol == OFFICIAL)


def _source(name: str, protocol: str, template: Template, rows: Rows) -> Source:
    paper = protocol == PAPER
    metrics, tokens = (infinite_metrics.PAPER, PAPER_NEW_TOKENS) if paper else (infinite_metrics.OFFICIAL, NEW_TOKENS)
    task = Task(name, metrics[name], tokens[name], least_one=paper)
    return Source(task, len(rows), lambda index: _item(name, template, rows[index]), template.source)


def _item(name: str, template: Template, row: Row) -> Item:
    fields = {"context": row.text("context", "content"), "input": row.text("input")}
    fields["question"] = fields["input"]
    if name == "code_run":
        call = _search(r"func_[0-9]+\(-?[0-9]+\)", fields["input"], row, "call such as func_1(2)")
        fields |= {"func_call": call, "func": call.partition("(")[0]}
    elif name == "math_find":
        asked = _search("The .+ of", fields["input"], row, "number to find, such as 'The largest number of'")
        fields["prefix"] = f"What is {asked.lower()[:-3]} in the following list?"
    elif name in CHOICES:
        options = _options(row)
        fields |= {f"OPTION_{letter}": option for letter, option in zip(LETTERS, options, strict=True)}
        return Item(template.fill(fields), _choice(row, options), row.place)
    labels = _numbers(name, row) if name in NUMBERS else row.texts("answer")
    if not labels:
        raise DataError(f"{row.place}: field 'answer' is an empty list")
    return Item(template.fill(fields), labels, row.place)


def _search(pattern: str, text: str, row: Row, what: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise DataError(f"{row.place}: field 'input' has no {what}")
    return found[0]


def _options(row: Row) -> list[str]:
    options = row.texts("options")
    if len(options) != len(LETTERS):
        raise DataError(f"{row.place}: field 'options' has {len(options)} entries; there have to be {len(LETTERS)}")
    return options


def _choice(row: Row, options: Sequence[str]) -> list[str]:
    """The right option's text and letter, from its text, a list of it, or both."""
    answer = row.texts("answer")
    if len(answer) == 2 and answer[1] in LETTERS:
        return answer
    if len(answer) != 1 or answer[0] not in options:
        raise DataError(f"{row.place}: answer {answer} is none of the options {options}")
    return [answer[0], LETTERS[options.index(answer[0])]]


def _numbers(name: str, row: Row) -> list[Any]:
    answer = row.get("answer")
    labels = answer if isinstance(answer, list) else [answer]
    kinds = NUMBERS[name]
    if not all(isinstance(label, kinds) and not isinstance(label, bool) for label in labels):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{row.place}: answer {answer!r}: give {wanted}, or a list of it")
    return labels

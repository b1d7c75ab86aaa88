"""InfiniteBench (docs/sources.md §4.4): DIR/{task}.jsonl with id, context or content, input, answer, options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.published import infinite_metrics as scored
from bench.published import wording
from bench.published.metrics import Metric, best_of, character_f1, qa_f1, rouge_l_sum, rouge_version
from bench.published.suite import PAPER, Item, Suite, Task, by_task
from bench.published.templates import Template
from bench.runs.jsonl import DataError, Row
from restkv.lm import LM

KIND = "infinitebench"
OFFICIAL_LENGTH = 131072  # tokens of prompt
LETTERS = "ABCD"
CHOICES = ("longbook_choice_eng", "code_debug")
NUMBERS = {"math_find": (int, float), "math_calc": (int, list), "code_run": (int,)}  # types of their labels


@dataclass(frozen=True)
class Rule:
    """Of a task: the hash of the published template, and new tokens and metric by the repository and by the paper's code."""

    template: str
    tokens: int
    metric: Metric
    paper_tokens: int
    paper_metric: Metric


TASKS = {
    "passkey": Rule("32a0f730f874", 6, scored.first_integer, 15, scored.first_integer),
    "number_string": Rule("f519b51c90c4", 12, scored.first_integer, 20, scored.first_integer),
    "kv_retrieval": Rule("afa97419dd69", 50, scored.value_among_words, 80, scored.value_among_words_paper),
    "longbook_sum_eng": Rule("897e95259c5b", 1200, rouge_l_sum, 1200, rouge_l_sum),
    "longbook_choice_eng": Rule("fddf5d8b4293", 40, scored.choice, 40, scored.choice_paper),
    "longbook_qa_eng": Rule("6f24f4abaf41", 40, best_of(qa_f1), 40, best_of(qa_f1)),
    "longbook_qa_chn": Rule("121d4332c1cc", 40, best_of(character_f1), 40, best_of(character_f1)),
    "longdialogue_qa_eng": Rule("0483f9f01c70", 40, scored.name_found, 40, scored.name_among_words),
    "math_find": Rule("df2334891e94", 3, scored.first_number, 3, scored.first_number_paper),
    "math_calc": Rule("ebf0b348e08e", 30000, scored.matching_prefix, 30000, scored.matching_prefix_paper),
    "code_run": Rule("8cfbec428859", 5, scored.last_integer, 5, scored.last_integer),
    "code_debug": Rule("e485a37d7c9c", 5, scored.debug, 5, scored.debug_paper),
}


def infinitebench(lm: LM, folder: Path, names: Sequence[str] | None, protocol: str, templates: Path | None) -> Suite:
    """The benchmark on a folder of its files, see by_task.

    Args:
        templates: a clone of its repository, or the Python file with the templates; None takes our own wording.
    """
    hashes = {name: rule.template for name, rule in TASKS.items()}
    suite = by_task(KIND, lm, folder, names, protocol, templates, hashes, wording.INFINITEBENCH, _task, _item)
    if any(source.task.name == "longbook_sum_eng" for source in suite.sources):
        suite = replace(suite, facts={**suite.facts, **rouge_version()})
    if protocol == PAPER:
        return suite
    return replace(suite, max_length=min(OFFICIAL_LENGTH, lm.config.max_positions), joined=True)


def _task(name: str, protocol: str) -> Task:
    rule = TASKS[name]
    if protocol == PAPER:
        return Task(name, rule.paper_metric, rule.paper_tokens, least_one=True)
    return Task(name, rule.metric, rule.tokens)


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
        options = row.texts("options")
        if len(options) != len(LETTERS):
            raise DataError(f"{row.place}: field 'options' has {len(options)} entries; there have to be {len(LETTERS)}")
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

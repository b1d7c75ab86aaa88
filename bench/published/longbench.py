"""LongBench v1, its 16 English and code tasks (docs/sources.md §4.3).

A folder has DIR/{task}.jsonl with input, context, answers and all_classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.published import wording
from bench.published.data import DataError, Row, Rows
from bench.published.metrics import (
    Metric,
    best_class,
    best_of,
    code_similarity,
    number_share,
    paragraph_share,
    qa_f1,
    rouge_l,
)
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
from bench.published.templates import LONGBENCH, Template, find_templates
from restkv.lm import LM

KIND = "longbench"
NO_CHAT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}  # asked as plain text even of chat models
METRICS: dict[str, tuple[Metric, int]] = {  # metric and max_new_tokens
    "narrativeqa": (best_of(qa_f1), 128),
    "qasper": (best_of(qa_f1), 128),
    "multifieldqa_en": (best_of(qa_f1), 64),
    "hotpotqa": (best_of(qa_f1), 32),
    "2wikimqa": (best_of(qa_f1), 32),
    "musique": (best_of(qa_f1), 32),
    "gov_report": (best_of(rouge_l), 512),
    "qmsum": (best_of(rouge_l), 512),
    "multi_news": (best_of(rouge_l), 512),
    "trec": (best_class, 64),
    "triviaqa": (best_of(qa_f1, first_line=True), 32),
    "samsum": (best_of(rouge_l, first_line=True), 128),
    "passage_count": (best_of(number_share), 32),
    "passage_retrieval_en": (best_of(paragraph_share), 32),
    "lcc": (best_of(code_similarity), 64),
    "repobench-p": (best_of(code_similarity), 64),
}


def longbench(lm: LM, folder: Path, names: Sequence[str] | None, protocol: str, templates: Path | None) -> Suite:
    """The benchmark on a folder of its files.

    Args:
        names: tasks; None takes all that there are files of.
        templates: the repository's clone, or its dataset2prompt.json; None takes our own wording.
    Raises:
        DataError: a file, row or template that is not as it should be (all rows are looked at).
    """
    check_protocol(protocol)

    def path(name: str) -> Path:
        return folder / f"{name}.jsonl"

    names = choose(names, list(METRICS), lambda name: path(name) if path(name).exists() else None, folder)
    texts, digest = find_templates(KIND, templates, {name: LONGBENCH[name] for name in names}, wording.LONGBENCH)
    files = {name: Rows(path(name)) for name in names}
    sources = []
    for name, rows in files.items():
        for row in rows:
            _item(name, texts[name], row)
        sources.append(_source(name, protocol, texts[name], rows))
    facts = {"files": {name: rows.digest for name, rows in files.items()}, "templates": digest}
    return Suite(KIND, protocol, tuple(sources), longest_prompt(lm, protocol), end_ids(lm, protocol), facts)


def _source(name: str, protocol: str, template: Template, rows: Rows) -> Source:
    metric, tokens = METRICS[name]
    official = protocol == OFFICIAL
    task = Task(
        name,
        metric,
        tokens,
        chat=official and name not in NO_CHAT,
        least_one=protocol == PAPER or name == "samsum",
        newline_ends=official and name == "samsum",
    )
    return Source(task, len(rows), lambda index: _item(name, template, rows[index]), template.source)


def _item(name: str, template: Template, row: Row) -> Item:
    answers, classes = row.texts("answers"), row.texts("all_classes") if name == "trec" else ()
    if name == "passage_retrieval_en":
        for answer in answers:
            if not re.search(r"Paragraph \d+", answer):
                raise DataError(f"{row.place}: answer {answer!r} names no paragraph, such as Paragraph 7")
    prompt = template.fill({"context": row.text("context"), "input": row.text("input")})
    return Item(prompt, answers, row.place, classes)

"""LongBench v1, its 16 English and code tasks (docs/sources.md §4.3).

A folder has DIR/{task}.jsonl with input, context, answers and all_classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.published import metrics, wording
from bench.published.metrics import Metric, best_of
from bench.published.suite import OFFICIAL, Item, Suite, Task, by_task
from bench.published.templates import Template
from bench.runs.jsonl import DataError, Row
from restkv.lm import LM

KIND = "longbench"
NO_CHAT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}  # asked as plain text even of chat models
# Metric, max_new_tokens, and the hash of the published template (docs/sources.md §4.3).
TASKS: dict[str, tuple[Metric, int, str]] = {
    "narrativeqa": (best_of(metrics.qa_f1), 128, "aada7ed24b06"),
    "qasper": (best_of(metrics.qa_f1), 128, "0fbdd123fe7f"),
    "multifieldqa_en": (best_of(metrics.qa_f1), 64, "20b4666a2de8"),
    "hotpotqa": (best_of(metrics.qa_f1), 32, "9ec4ae308865"),
    "2wikimqa": (best_of(metrics.qa_f1), 32, "9ec4ae308865"),
    "musique": (best_of(metrics.qa_f1), 32, "9ec4ae308865"),
    "gov_report": (best_of(metrics.rouge_l), 512, "91c25d585b18"),
    "qmsum": (best_of(metrics.rouge_l), 512, "dca23b678fe0"),
    "multi_news": (best_of(metrics.rouge_l), 512, "2af3f28c40b9"),
    "trec": (metrics.best_class, 64, "0eff8bebdba9"),
    "triviaqa": (best_of(metrics.qa_f1, first_line=True), 32, "00a802e6377e"),
    "samsum": (best_of(metrics.rouge_l, first_line=True), 128, "a68d88423490"),
    "passage_count": (best_of(metrics.number_share), 32, "986550b6c610"),
    "passage_retrieval_en": (best_of(metrics.paragraph_share), 32, "39b96b7fa52b"),
    "lcc": (best_of(metrics.code_similarity), 64, "6a1f24cf0bb8"),
    "repobench-p": (best_of(metrics.code_similarity), 64, "ee9ec182ea5f"),
}


def longbench(lm: LM, folder: Path, names: Sequence[str] | None, protocol: str, templates: Path | None) -> Suite:
    """The benchmark on a folder of its files, see by_task.

    Args:
        templates: the repository's clone, or its dataset2prompt.json; None takes our own wording.
    """
    hashes = {name: digest for name, (_, _, digest) in TASKS.items()}
    return by_task(KIND, lm, folder, names, protocol, templates, hashes, wording.LONGBENCH, _task, _item)


def _task(name: str, protocol: str) -> Task:
    metric, tokens, _ = TASKS[name]
    official = protocol == OFFICIAL
    return Task(
        name,
        metric,
        tokens,
        chat=official and name not in NO_CHAT,
        least_one=not official or name == "samsum",
        newline_ends=official and name == "samsum",
    )


def _item(name: str, template: Template, row: Row) -> Item:
    answers, classes = row.texts("answers"), row.texts("all_classes") if name == "trec" else ()
    if name == "passage_retrieval_en":
        for answer in answers:
            if not re.search(r"Paragraph \d+", answer):
                raise DataError(f"{row.place}: answer {answer!r} names no paragraph, such as Paragraph 7")
    prompt = template.fill({"context": row.text("context"), "input": row.text("input")})
    return Item(prompt, answers, row.place, classes)

"""Short runs of the published benchmarks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.published.run import Plan
from bench.published.suite import Suite
from bench.runs.methods import parse_methods

METHODS = tuple(parse_methods("restkv:window=4,h2o,streamingllm"))


def short(suite: Suite, tokens: int = 3) -> Suite:
    """With answers of a few tokens, so that the real ones of 30,000 need not be waited for."""
    sources = [replace(source, task=replace(source.task, max_new_tokens=tokens)) for source in suite.sources]
    return replace(suite, sources=tuple(sources))


def plan(suite: Suite, **changes: Any) -> Plan:
    return replace(Plan(suite, "recall-mini", METHODS, (16, 0.5)), **changes)

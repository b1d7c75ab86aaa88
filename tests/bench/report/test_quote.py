"""Tables that documents quote from bench/results (bench/report/quote.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.report.quote import ROOT, quoted, table

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    wide = {"caption": "Errors: means", "columns": ["method", "8x"], "lines": [["full", "0.1"], ["random", "0.9"]]}
    long = {
        "caption": "Errors",
        "columns": ["method", "at", "error", "n"],
        "lines": [["full", "1x", "0.1", "8"], ["random", "8x", "0.9", "8"], ["random", "16x", "1.0", "7"]],
    }
    (tmp_path / "run.json").write_text(json.dumps({"tables": [wide, long]}))
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_quote_is_what_was_measured(path: Path) -> None:
    text = path.read_text("utf-8")
    assert quoted(text, ROOT / "bench" / "results") == text, "python -m bench.report.quote mends it"


def test_the_results_page_quotes() -> None:
    assert (ROOT / "docs" / "results.md").read_text("utf-8").count("<!-- quote ") > 15


def test_a_quoted_table_is_written_anew_and_nothing_else(results: Path) -> None:
    comment = '<!-- quote {"from": "run.json", "table": "Errors: means"} -->\n'
    text = f"Before.\n\n{comment}| method | 8x |\n| :-- | --: |\n| full | 7 |\n\n| other | table |\n"
    lines = "| method | 8x |\n| :-- | --: |\n| full | 0.1 |\n| random | 0.9 |\n"
    assert quoted(text, results) == f"Before.\n\n{comment}{lines}\n| other | table |\n"
    assert quoted(quoted(text, results), results) == quoted(text, results)


def test_columns_and_lines_are_chosen(results: Path) -> None:
    wish = {"from": "run.json", "table": "Errors", "columns": ["method", "error"], "where": {"at": ["8x", "1x"]}}
    assert table(wish, results).splitlines()[2:] == ["| full | 0.1 |", "| random | 0.9 |"]
    some = {"from": "run.json", "table": "Errors", "methods": ["random"], "columns": ["at", "n"]}
    assert table(some, results).splitlines()[2:] == ["| 8x | 8 |", "| 16x | 7 |"]


def test_values_of_a_column_become_columns(results: Path) -> None:
    wish = {"from": "run.json", "table": "Errors", "methods": ["random"], "spread": ["at", "error", "at {}"]}
    assert table(wish, results).splitlines() == [
        "| method | at 8x | at 16x |",
        "| :-- | --: | --: |",
        "| random | 0.9 | 1.0 |",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"table": "Err"}, "begins 2 captions"),
        ({"table": "Speed"}, "begins 0 captions"),
        ({"columns": ["share"]}, "'share' is no column"),
        ({"methods": ["full", "h2o"]}, "no line has 'h2o' under 'method'"),
    ),
)
def test_what_is_not_there_is_named(results: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        table({"from": "run.json", "table": "Errors", **change}, results)

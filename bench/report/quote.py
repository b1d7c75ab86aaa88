"""Tables that documents quote from bench/results, so that no figure is copied by hand.

    python -m bench.report.quote            # write every quoted table of README.md and docs/*.md anew
    python -m bench.report.quote --check    # or say which differ, and fail

A quoted table stands below a comment that says, as JSON, where it comes from:

    <!-- quote {"from": "ruler-1024.json", "table": "1024 tokens, question in sight: mean over tasks"} -->

"from" is a file of bench/results and "table" the caption of one of its tables, or how no other begins. "columns" picks some,
"where" {column: values} lines, "methods" lines by their first column, and "spread" [column, value, heading] makes a column of
every value of a column ("{}" in its heading stands for it).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.page import markdown_table
from restkv.files import write_text

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"(<!-- quote (\{.*\}) -->\n)((?:\|.*\n)*)")

Line = list[str]


def quoted(text: str, results: Path) -> str:
    """The document with its quoted tables as they are in `results` now."""

    def fresh(match: re.Match[str]) -> str:
        return match[1] + table(json.loads(match[2]), results) + "\n"

    return QUOTED.sub(fresh, text)


def table(wish: Mapping[str, Any], results: Path) -> str:
    """One quoted table as Markdown; `wish` is what the comment says."""
    tables = {part["caption"]: part for part in json.loads((results / wish["from"]).read_text("utf-8"))["tables"]}
    begun = [caption for caption in tables if caption.startswith(wish["table"])]
    if wish["table"] not in tables and len(begun) != 1:
        raise ValueError(f"{wish['from']}: {wish['table']!r} begins {len(begun)} captions; give one of {list(tables)}")
    found = tables.get(wish["table"]) or tables[begun[0]]
    columns, lines = found["columns"], found["lines"]

    def place(column: str) -> int:
        if column not in columns:
            raise ValueError(f"{wish['from']}: {column!r} is no column of {', '.join(columns)}")
        return columns.index(column)

    wanted = {place(column): values for column, values in wish.get("where", {}).items()}
    if "methods" in wish:
        wanted[0] = wish["methods"]
    lines = [line for line in lines if all(line[at] in values for at, values in wanted.items())]
    for at, values in wanted.items():
        if missing := [value for value in values if value not in [line[at] for line in lines]]:
            raise ValueError(f"{wish['from']}: no line has {missing[0]!r} under {columns[at]!r}")
    if "spread" in wish:
        column, value, heading = wish["spread"]
        return markdown_table(*_spread(lines, columns[0], place(column), place(value), heading))
    chosen = wish.get("columns", columns)
    return markdown_table(chosen, [[line[place(column)] for column in chosen] for line in lines])


def _spread(lines: Sequence[Line], first: str, column: int, value: int, heading: str) -> tuple[Line, list[Line]]:
    """A line for every first cell, a column for every value of a column."""
    heads = list(dict.fromkeys(line[column] for line in lines))
    cells = {(line[0], line[column]): line[value] for line in lines}
    names = dict.fromkeys(line[0] for line in lines)
    return [first, *map(heading.format, heads)], [
        [name, *(cells.get((name, at), "") for at in heads)] for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a table is not what the results say"
    )
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        try:
            fresh = quoted(text, ROOT / "bench" / "results")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(f"{path.relative_to(ROOT)}: {type(error).__name__}: {error}") from None
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                write_text(path, fresh)
    for path in stale:
        print(f"{path}: {'is not what bench/results says' if check else 'written'}")
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

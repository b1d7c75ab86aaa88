"""One HTML page from a folder of results: tables, figures, and how they were made. It needs no script and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from bench.report.figures import as_image, need_matplotlib
from bench.report.kinds import fitting, parts, progress, read_run
from bench.runs.benchmark import Table, benchmark
from bench.runs.folder import TIMINGS
from bench.runs.lines import RunError, lines
from bench.runs.schema import number
from restkv.files import write_text
from restkv.saving.strict_json import parse

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin: .4rem 0 1.2rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .6rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #111 } th:first-child, td:first-child { text-align: left }
tbody tr:nth-child(even) { background: #f4f4f4 }
figure { margin: 1rem 0 1.6rem } figure img { max-width: 100%; height: auto } figcaption { font-size: .9rem; color: #333 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem }
dt { color: #444 } dd { margin: 0 }
pre { white-space: pre-wrap; font-size: .8rem; background: #f4f4f4; padding: .6rem }
.note { border-left: 4px solid #d55e00; padding-left: .8rem }
@media print { body { max-width: none; font-size: 10pt } figure, tr { break-inside: avoid } .scroll { overflow: visible } }
"""


def write_report(folder: Path) -> Path:
    """Build DIR/report.html from the manifest and the rows alone, of a complete run or of what there is of one."""
    need_matplotlib()
    path = folder / "report.html"
    write_text(path, build(folder))
    return path


def markdown(folder: Path) -> str:
    """The run's tables as Markdown, under a line that says how they were made."""
    run = as_json(folder)
    blocks = [_how_made(run)]
    for table in run["tables"]:
        blocks += [f"**{table['caption']}**", markdown_table(table["columns"], table["lines"])]
    return "\n\n".join(blocks) + "\n"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left and the others to the right."""
    rows = [columns, [":--", *["--:"] * (len(columns) - 1)], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def as_json(folder: Path) -> dict[str, Any]:
    """What bench/results keeps of a run: its manifest and tables, JSON-ready; the samples themselves are too many."""
    manifest, rows = read_run(folder)
    kind, arguments = manifest["kind"], manifest["arguments"]
    done, total = progress(kind, arguments, rows)
    tables = [asdict(part) for part in parts(kind, arguments, rows) if isinstance(part, Table)]
    return {"manifest": manifest, "done": done, "total": total, "computing": _hours(folder), "tables": tables}


def _how_made(run: Mapping[str, Any]) -> str:
    manifest = run["manifest"]
    how = f"{benchmark(manifest['kind']).title} of {manifest['model']['fingerprint']}, {run['done']} of {run['total']} results"
    return f"{how}; {_plain(manifest['versions'])}; {_plain(manifest['machine'])}."


def build(folder: Path) -> str:
    """The page's text."""
    manifest, rows = read_run(folder)
    kind, arguments = manifest["kind"], manifest["arguments"]
    title = f"{benchmark(kind).title}: {manifest['model']['fingerprint']}"
    done, total = progress(kind, arguments, rows)
    body = [f"<h1>{escape(title)}</h1>", "\n".join(_how(manifest, folder))]
    if done < total:
        body.append(f'<p class="note">Partial run: {done} of {total} results. Run the same command again to go on.</p>')
    for part in parts(kind, arguments, rows):
        if isinstance(part, Table):
            body.append(_table(part))
        else:
            with fitting("figures"):
                image = as_image(part.draw(), part.caption)
            body.append(f"<figure>{image}<figcaption>{escape(part.caption)}</figcaption></figure>")
    body.append("<h2>Methods in full</h2>\n" + "\n".join(_methods(manifest)))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    return (
        f'<div class="scroll"><table><caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _how(manifest: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Arguments, versions, machine and time, as a list of terms."""
    facts = {name: _plain(value) for name, value in manifest["arguments"].items()}
    facts |= {"started": manifest["started"], "computing": _hours(folder)}
    facts |= {"versions": _plain(manifest["versions"]), "machine": _plain(manifest["machine"])}
    yield "<dl>"
    for name, value in facts.items():
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>"


def _methods(manifest: Mapping[str, Any]) -> Iterator[str]:
    for label, described in manifest["methods"].items():
        preset = f", preset {described['preset']}" if described["preset"] else ""
        yield f"<h3>{escape(label + preset)}</h3><pre>{escape(json.dumps(described['policy'], ensure_ascii=False))}</pre>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hours(folder: Path) -> str:
    """Time spent, summed over all sittings; a line that a kill has torn, or that says nothing of the kind, does not count."""
    seconds = 0.0
    try:
        for line in lines(folder / TIMINGS):
            with suppress(ValueError):
                said = parse(line.decode())
                if isinstance(said, dict) and number(0, 1e9)(said.get("seconds")):
                    seconds += said["seconds"]
    except RunError:
        return "unknown"
    return f"{seconds / 3600:.2f} h"

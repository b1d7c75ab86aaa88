"""What `restkv bench compile` shows: operations, decoding and graphs as tables, times as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.figures import Bars, bar_panels, save_png
from bench.runs.benchmark import Drawing, Part, Table

Row = Mapping[str, Any]
# In reading order, and as tables call them.
NAMES = {
    "decode": "decode step",
    "evict": "eviction",
    "score": "scoring a prompt",
    "prefill": "sparse prefill",
    "compact": "compaction",
}
EAGER_ONLY = "eager only"
PICTURE = "compile.png"


def shown(arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and the figure of as many rows as there are."""
    held = f", {arguments['weights']} weights" if "weights" in arguments else ""
    what = f"{arguments['shape']}, {arguments['dtype']}{held}, budget {arguments['budget']}, "
    what += f"prompts of {arguments['context']:,} tokens, {arguments['threads']} threads"
    operations, decoding, jobs = (_of(rows, part) for part in ("operation", "decoding", "jobs"))
    parts: list[Part] = []
    if operations:
        columns = "operation,method,eager ms,compiled ms,eager / compiled,compile s cold,warm,pays after tokens cold,"
        columns += "if warm,graphs,laps"
        lines = [_operation(row) for name in NAMES for row in operations if row["operation"] == name]
        parts.append(Table(f"Operations, eager and compiled: {what}", columns.split(","), lines))
        parts.append(Drawing(f"Milliseconds, eager and compiled: {what}", lambda: _figure(rows)))
    if decoding:
        columns = "method,tokens,eager step ms,with evictions,their share,compiled step ms,compiled with evictions,"
        columns += "their share compiled,evictions are,compile s cold,warm,pays after tokens cold,if warm,load average"
        parts.append(
            Table(f"Decoding over whole intervals: {what}", columns.split(","), list(map(_decoding, decoding)))
        )
    if jobs:
        caption = f"Graphs over {arguments['jobs']} random jobs: a tiny model, budget {arguments['budget']}"
        lines = [[row["method"], *(str(row[name]) for name in ("jobs", "graphs", "new_graphs"))] for row in jobs]
        every = ["all", *(str(sum(row[name] for row in jobs)) for name in ("jobs", "graphs", "new_graphs"))]
        columns = "method,jobs,graphs of its first job,recompiles after it"
        parts.append(Table(caption, columns.split(","), [*lines, every]))
    return parts


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def tokens_until(seconds: float, eager_ms: float, compiled_ms: float, tokens: int) -> int | None:
    """Tokens after which compiling that took so long has paid, where every `tokens` of them save the difference once; None:
    never, since compiled is no faster.

    >>> tokens_until(8, 50, 10, 1), tokens_until(8, 50, 10, 128), tokens_until(8, 10, 10, 1)
    (200, 25600, None)
    """
    saved = (eager_ms - compiled_ms) / 1e3
    return None if saved <= 0 else math.ceil(round(seconds / saved, 6)) * tokens


def _pays(seconds: float, eager_ms: float, compiled_ms: float, tokens: int) -> str:
    after = tokens_until(seconds, eager_ms, compiled_ms, tokens)
    return "never" if after is None else f"{after:,}"


def _operation(row: Row) -> list[str]:
    eager, compiled = row["eager_ms"], row["compiled_ms"]
    first = [NAMES[row["operation"]], row["method"], _spread(eager, row["eager_quartiles_ms"])]
    if compiled is None:
        return [*first, EAGER_ONLY, *[""] * 6, str(row["laps"])]
    cold, warm = row["cold_s"], row["warm_s"]
    return [
        *first,
        _spread(compiled, row["compiled_quartiles_ms"]),
        f"{eager / compiled:.2f}",
        f"{cold:.1f}",
        f"{warm:.1f}",
        *(_pays(seconds, eager, compiled, row["tokens"]) for seconds in (cold, warm)),
        str(row["graphs"]),
        str(row["laps"]),
    ]


def _decoding(row: Row) -> list[str]:
    cells = [row["method"], f"{row['eager_tokens']}, {row['compiled_tokens']}"]
    for who in ("eager", "compiled"):
        step, token = row[f"{who}_step_ms"], row[f"{who}_token_ms"]
        cells += [_ms(step), _ms(token), f"{1 - step / token:.1%}"]
    cells += [row["evicts"], f"{row['cold_s']:.1f}", f"{row['warm_s']:.1f}"]
    cells += [_pays(row[name], row["eager_token_ms"], row["compiled_token_ms"], 1) for name in ("cold_s", "warm_s")]
    return [*cells, "-".join(f"{load:.1f}" for load in row["load_average"])]


def _spread(middle: float, quartiles: Sequence[float]) -> str:
    return f"{_ms(middle)} ({'-'.join(map(_ms, quartiles))})"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figure(rows: Sequence[Row]) -> Any:
    """A panel for every operation, bars for its methods, eager above compiled."""
    panels = []
    for name, title in NAMES.items():
        some = [row for row in _of(rows, "operation") if row["operation"] == name]
        if some:
            series = {who: [row[f"{who}_ms"] for row in some] for who in ("eager", "compiled")}
            panels.append(Bars(title, [row["method"] for row in some], series))
    return bar_panels(panels, "ms")


def pictures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The figure as a file of its own."""
    if not _of(rows, "operation"):
        return []
    save_png(_figure(rows), folder / PICTURE)
    return [folder / PICTURE]

"""The table and the figure of a contest of speed or memory, made of its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench.report.figures import Line, Panel, line_panels
from bench.report.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def title(result: Mapping[str, Any]) -> str:
    contest = result["contest"]
    shape = contest["preset"] or contest["model"]
    weights = contest.get("weights", "auto")  # files of before have none
    dtype = contest["dtype"] if weights == "auto" else f"{contest['dtype']}, ours with {weights} weights"
    text = f"{shape}, {dtype}, budget {contest['budget']}, {contest['device']}, {contest['threads']} threads"
    if "rates" in result:
        rate = result["rates"]
        text += f"; reads {rate['read_bytes_per_s'] / 1e9:.1f} GB/s, multiplies "
        text += f"{rate['operations_per_s'] / 1e9:.0f} GFLOP/s"
    return text


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines."""
    if result["kind"] == "memory":
        columns = "contestant,context,batch,kept,loaded,prefill peak,after it,decode peak,cache".split(",")
        names = ["loaded", "prefill_peak", "after_prefill", "decode_peak", "cache"]
        return columns, [
            [*_who(row), f"{row['kept']:,.0f}", *(f"{row[f'{name}_bytes'] / 1e6:,.1f} MB" for name in names)]
            for row in result["rows"]
        ]
    columns = (
        "contestant,context,batch,kept,cache MB,TTFT s,of floor,evicting,TPOT ms,with evictions,tokens/s,of floor,first round s"
    ).split(",")
    return [*columns, "graphs, new"], [
        [
            *_who(row),
            f"{row['kept']:,.0f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            "" if row["ttft_s"] is None else f"{row['ttft_s']:.2f}",
            _share(row["ttft_floor_s"], row["ttft_s"]),
            _share(row["evicting_s"], row["ttft_s"]),
            f"{row['tpot_ms']:.1f}",
            "" if row.get("tpot_with_evictions_ms") is None else f"{row['tpot_with_evictions_ms']:.1f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['share_of_floor']:.0%}",
            f"{row['first_round_s']:.1f}",
            f"{row['graphs']}, {row['new_graphs']}",
        ]
        for row in result["rows"]
    ]


def _share(part: float | None, whole: float | None) -> str:
    return "" if part is None or whole is None else f"{part / whole:.1%}"


def _who(row: Mapping[str, Any]) -> list[str]:
    return [row["contestant"], f"{row['context']:,}", str(row["batch"])]


def figure(result: Mapping[str, Any]) -> Figure:
    """Latency, or memory, against context: one panel per batch size."""
    names = list(dict.fromkeys(row["contestant"] for row in result["rows"]))
    speed = result["kind"] == "speed"
    panels = []
    for batch in result["contest"]["batches"]:
        lines = []
        for name in names:
            rows = [row for row in result["rows"] if (row["contestant"], row["batch"]) == (name, batch)]
            lines.append(Line(name, [row["context"] for row in rows], list(map(_estimate, rows))))
        panels.append(Panel(f"batch {batch}", lines))
    y_name = "TPOT, ms" if speed else "peak above the weights, MB"
    return line_panels(panels, names, "context, tokens", y_name, log_x=True, log_y=True)


def _estimate(row: Mapping[str, Any]) -> Estimate:
    """Time of a token with its quartiles, or a peak of memory."""
    if "tpot_ms" in row:
        low, high = row["tpot_quartiles_ms"]
        return Estimate(row["tpot_ms"], low, high, 1)
    peak = row["prefill_peak_bytes"] / 1e6
    return Estimate(peak, peak, peak, 1)

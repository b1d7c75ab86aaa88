"""How fast decoding is, side by side: python -m bench.speed (docs/performance.md).

Every contestant is a process of its own (workers.py). The bench first measures how fast this machine reads memory, prints
what that makes of the bytes a decode step must read (weights and live cache), then lets the contestants take turns: each round,
each decodes a few tokens, so that a change of the machine's mood hits all alike. Medians over all rounds; the first round, which
compiles and warms up, is left out and reported as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.workers import Process
from modeling.families import config_from_dict

# Shapes as config.json has them; the weights are random, nothing is downloaded.
PRESETS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("presets.json").read_text())


def read_rate(threads: int, megabytes: int = 256) -> float:
    """Bytes per second at which a compiled matrix-vector product reads float32 weights: the best of ten."""
    torch.set_num_threads(threads)
    rows = megabytes * (1 << 20) // (4 * 1024)
    matrix, vector = torch.randn(rows, 1024), torch.randn(1024)
    product = torch.compile(lambda m, v: (m * v).sum(-1), fullgraph=True, dynamic=False)
    laps = []
    for _ in range(11):
        start = time.perf_counter()
        product(matrix, vector)
        laps.append(time.perf_counter() - start)
    return matrix.nbytes / min(laps[1:])


def weight_bytes(config: dict[str, Any], dtype: str) -> int:
    """Bytes of the weights a decode step reads: all but the embedding, of which it reads one row (unless tied)."""
    c = config_from_dict(config)
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    return (c.num_layers * layer + c.vocab_size * c.hidden_size) * getattr(torch, dtype).itemsize


def contestants(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any], str | None]]:
    """name -> (module, its arguments, interpreter)."""
    config = PRESETS[args.preset]
    ours = {"config": config, "dtype": args.dtype, "backend": args.backend, "tokens": (args.rounds + 1) * args.tokens}
    chosen: dict[str, tuple[str, dict[str, Any], str | None]] = {}
    for method in args.methods.split(","):
        options = {} if method == "full" else {"budget": args.budget}
        chosen[f"restkv {method}"] = ("bench.ours", {**ours, "method": method, "options": options}, None)
    if not args.no_peers:
        peer = {"config": config, "dtype": args.dtype}
        chosen["transformers full"] = ("bench.peers.hf", peer, args.peer_python)
    return chosen


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole comparison at every context; returns the JSON-ready result."""
    rate = read_rate(args.threads)
    config, rows = PRESETS[args.preset], []
    for context in args.contexts:
        running = {
            name: Process(name, module, [json.dumps(values)], python, args.threads)
            for name, (module, values, python) in contestants(args).items()
        }
        laps: dict[str, list[float]] = {name: [] for name in running}
        first: dict[str, float] = {}
        prefills, last = {}, {}
        try:
            for name, process in running.items():
                process.ask("prefill", context=min(context, 256))  # warm-up: memory, thread pools, compiled scorers
                prefills[name] = process.ask("prefill", context=context)
            for turn in range(args.rounds + 1):
                for name, process in running.items():
                    last[name] = process.ask("decode", tokens=args.tokens)
                    seconds = last[name]["seconds"]
                    if turn == 0:
                        first[name] = sum(seconds)
                    else:
                        laps[name] += seconds
        finally:
            for process in running.values():
                process.close()
        for name in running:
            tpot = statistics.median(laps[name])
            cache = last[name]["cache_bytes"]
            floor = (weight_bytes(config, args.dtype) + cache) / rate
            rows.append(
                {
                    "contestant": name,
                    "context": context,
                    "ttft_s": prefills[name]["seconds"][0],
                    "prefill_peak_bytes": prefills[name]["peak_above"],
                    "tpot_ms": 1e3 * tpot,
                    "tokens_per_s": 1 / tpot,
                    "floor_ms": 1e3 * floor,
                    "share_of_floor": floor / tpot,
                    "kept": last[name]["kept"],
                    "cache_bytes": cache,
                    "first_round_s": first[name],
                    "graphs": last[name].get("graphs"),
                }
            )
    return {"command": vars(args) | {"out": None}, "machine": machine(args.threads), "read_rate": rate, "rows": rows}


def machine(threads: int) -> dict[str, Any]:
    """Processor, threads and versions, as every result states them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        **versions,
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    command, rate = result["command"], result["read_rate"] / 1e9
    table = Table(title=f"{command['preset']}, {command['dtype']}, weights read at {rate:.1f} GB/s at best")
    for heading in ("contestant", "context", "kept", "cache MB", "TTFT s", "TPOT ms", "floor ms", "of floor"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for row in result["rows"]:
        table.add_row(
            row["contestant"],
            f"{row['context']:,}",
            f"{row['kept']:,.0f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['ttft_s']:.2f}",
            f"{row['tpot_ms']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['share_of_floor']:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default=next(iter(PRESETS)))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 8192])
    parser.add_argument("--methods", default="restkv,full", help="names separated by commas")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--backend", choices=("flex", "sdpa"), default="flex")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns each contestant takes, after one that warms up")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per turn")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--peer-python", help="interpreter that has transformers, when it is not this one")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args(arguments)
    result = measure(args)
    show(result)
    text = json.dumps(result, indent=1)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

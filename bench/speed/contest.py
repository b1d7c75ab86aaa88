"""How fast and how large: ours, transformers and kvpress side by side (`restkv bench speed`, `restkv bench memory`).

Every contestant is a process of its own (workers.py). The bench first measures what this machine can do (floor.py), then
lets the contestants take turns: each round, each decodes a few tokens, so that a change of the machine's mood hits all alike.
TPOT is the median over all rounds; the first round, which compiles and warms up, is left out and reported as such.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.runs.folder import machine as described_machine
from bench.runs.methods import Method
from bench.speed.floor import Machine, decode_floor, matrix_parameters, measure_machine, prefill_floor
from bench.speed.workers import Process
from modeling.config import ModelConfig
from modeling.families.registry import config_from_dict, read_config
from modeling.quant import WEIGHTS
from restkv.errors import PromptError
from restkv.patterns import parse_prefill
from restkv.saving.store import policy_to_dict

# Shapes as config.json has them; the weights are random, nothing is downloaded.
PRESETS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("presets.json").read_text())
PEERS: dict[str, dict[str, Any]] = {
    "transformers": {"cache": "dynamic", "press": None},
    "transformers-static": {"cache": "static", "press": None},
    "kvpress-snapkv": {"cache": "dynamic", "press": ["SnapKVPress", {"window_size": 32}]},
}
WARM_UP = 256  # tokens of a prompt that goes before: memory, thread pools, compiled scorers
Report = Callable[[str], None]
Answer = dict[str, Any]  # of a process, see bench.speed.workers.serve
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Contest:
    """Who is measured at what.

    Attributes:
        preset: a key of PRESETS, or None with a checkpoint's folder in `model`.
        methods: of ours, as bench/runs/methods.py reads them; "full" is our full cache.
        peers: keys of PEERS.
        prefills: how ours read their prompts ("dense", "chunked" or a sparse pattern, as text); every method in each way.
        prompts: prompts each contestant reads of every length, by turns; TTFT is their median.
        weights: of ours, as restkv.load takes them; a preset's are dense under "auto". Peers have theirs in `dtype`.
        rounds, tokens: turns each contestant takes after one that warms up, and tokens per turn.
        peer_python: interpreter that has the peers.
        filled: caches are filled with random entries instead of by running the prompts, where those would take too long; then
            there is no TTFT.
    """

    preset: str | None
    model: str | None
    dtype: str
    device: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    methods: tuple[str, ...]
    budget: int
    peers: tuple[str, ...]
    backend: str
    threads: int
    rounds: int
    tokens: int
    peer_python: str | None
    filled: bool = False
    prefills: tuple[str, ...] = ("dense",)
    prompts: int = 1
    weights: str = "auto"

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.model is None):
            raise PromptError("give a preset or a checkpoint, one of them")
        if self.preset is not None and self.preset not in PRESETS:
            raise PromptError(f"preset {self.preset!r} is unknown; choose from {', '.join(PRESETS)}")
        for peer in self.peers:
            if peer not in PEERS:
                raise PromptError(f"peer {peer!r} is unknown; choose from {', '.join(PEERS)}")
        if self.filled and "transformers-static" in self.peers:
            raise PromptError("peer 'transformers-static' cannot be filled; leave it out, or run the prompts")
        if self.weights not in ("auto", *WEIGHTS):
            raise PromptError(f"weights {self.weights!r} are not known; give auto, {', '.join(WEIGHTS)}")
        for prefill in self.prefills:
            parse_prefill(prefill)
            if self.filled and prefill != "dense":
                raise PromptError(
                    f"prefill {prefill!r}: a cache that is filled reads no prompt; leave one of the two out"
                )
        for name in ("contexts", "batches", "budget", "prompts", "rounds", "tokens", "threads"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise PromptError(f"{name} {value}: give whole numbers of at least 1")

    @property
    def config(self) -> ModelConfig:
        return read_config(Path(self.model)) if self.model else config_from_dict(PRESETS[self.preset or ""])

    @cached_property
    def contestants(self) -> dict[str, tuple[str, dict[str, Any], str | None]]:
        """name -> (module, its arguments, interpreter)."""
        chosen: dict[str, tuple[str, dict[str, Any], str | None]] = {}
        for text, prefill in product(self.methods, self.prefills):
            name = f"restkv {text}" + ("" if prefill == "dense" else f", {prefill}")
            chosen[name] = ("bench.speed.ours", self.ours(text, prefill), None)
        for peer in self.peers:
            theirs = {**self._common, **PEERS[peer], "budget": self.budget}
            chosen[peer] = ("bench.speed.peers.hf", theirs, self.peer_python)
        return chosen

    @property
    def _common(self) -> dict[str, Any]:
        """Arguments of every process."""
        return {
            "config": None if self.model else PRESETS[self.preset or ""],
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "tokens": (self.rounds + 1) * self.tokens,
        }

    def ours(self, method: str, prefill: str) -> dict[str, Any]:
        """Arguments of bench.speed.ours for one of our methods."""
        policy = policy_to_dict(Method.parse(method).policy(self.budget))
        own = {"backend": self.backend, "policy": policy, "prefill": prefill, "weights": self.weights}
        return {**self._common, **own}

    def takes_part(self, name: str, context: int) -> bool:
        """A press stays away from contexts that leave it nothing to compress."""
        return name not in PEERS or not PEERS[name]["press"] or context > self.budget

    def fits(self, name: str, context: int, batch: int, memory: int | None) -> bool:
        """Whether a contestant that keeps everything can be resident together with all others, in so many bytes (None: no bound).

        All have their weights at the same time, and those without a budget their caches; a twentieth is left for the rest.
        """
        full = [who for who in self.contestants if self._keeps_all(who)]
        if memory is None or name not in full:
            return True
        size: int = getattr(torch, self.dtype).itemsize
        embedding = 0 if self.config.tie_embeddings else self.config.vocab_size * self.config.hidden_size
        weights = (sum(matrix_parameters(self.config)) + embedding) * size
        cache = context * batch * self.config.kv_bytes_per_token(getattr(torch, self.dtype))
        return len(self.contestants) * weights + len(full) * cache < 0.95 * memory

    def _keeps_all(self, name: str) -> bool:
        return not PEERS[name]["press"] if name in PEERS else self.contestants[name][1]["policy"]["budget"] is None

    def start(self, name: str, environment: dict[str, str] | None = None) -> Process:
        module, values, python = self.contestants[name]
        return Process(name, module, [json.dumps(values)], python, self.threads, environment)


def measure_speed(
    contest: Contest, report: Report = print, start_up: bool = False, keep: Keep = lambda result: None
) -> dict[str, Any]:
    """TTFT and TPOT of every contestant at every context and batch size; JSON-ready.

    Args:
        start_up: measure also how long ours take from nothing to a first token, without and with kernels of an earlier process.
        keep: called with the result so far whenever a context and batch size are through.
    """
    contestants = contest.contestants  # a method that makes no sense is refused before minutes go into the machine
    machine = measure_machine(contest.device, contest.threads, contest.dtype)
    memory = None if contest.device == "cpu" else torch.cuda.get_device_properties(contest.device).total_memory
    rows: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []

    def result() -> dict[str, Any]:
        return _result("speed", contest, rows) | {"rates": asdict(machine), "start_up": starts}

    with ExitStack() as stack:
        processes = {name: stack.enter_context(closing(contest.start(name))) for name in contestants}
        for context, batch in product(contest.contexts, contest.batches):
            at = f"{context} tokens, batch {batch}"
            running = {name: process for name, process in processes.items() if contest.takes_part(name, context)}
            for name in [name for name in running if not contest.fits(name, context, batch, memory)]:
                running.pop(name).ask("drop")
                report(f"{at}: {name} is left out, its cache would not fit into the device's memory")
            made = _round_robin(contest, machine, running, context, batch, report)
            report(f"{at}: " + ", ".join(f"{row['contestant']} {row['tpot_ms']:.1f} ms" for row in made))
            rows += made
            keep(result())
    if start_up:
        starts += _start_ups(contest, report)
    return result()


def _start_ups(contest: Contest, report: Report) -> list[dict[str, Any]]:
    """Seconds from the start of a process to its second token, the first that is decoded: imports, weights (made, or read), a
    prompt of WARM_UP tokens, compiling."""
    made = []
    for name in (name for name in contest.contestants if name not in PEERS):
        with tempfile.TemporaryDirectory() as folder:
            seconds = []
            for _ in ("cold", "warm"):
                began = time.perf_counter()
                with closing(contest.start(name, {"TORCHINDUCTOR_CACHE_DIR": folder})) as process:
                    process.ask("prefill", context=WARM_UP, batch=1)
                    process.ask("decode", tokens=1)
                    seconds.append(time.perf_counter() - began)
        made.append({"contestant": name, "cold_s": seconds[0], "warm_s": seconds[1]})
        report(f"start-up of {name}: {seconds[0]:.1f} s, with kernels made before {seconds[1]:.1f} s")
    return made


def _round_robin(
    contest: Contest, machine: Machine, running: Mapping[str, Process], context: int, batch: int, report: Report
) -> list[dict[str, Any]]:
    for process in running.values():
        if contest.filled:
            process.ask("fill", context=context, batch=batch)
        else:
            process.ask("prefill", context=min(context, WARM_UP), batch=batch)
    prompts: dict[str, list[Answer]] = {name: [] for name in running}
    turns: dict[str, list[Answer]] = {name: [] for name in running}
    for _ in range(0 if contest.filled else contest.prompts):
        for name, process in running.items():
            read = process.ask("prefill", context=context, batch=batch)
            prompts[name].append(read)
            report(f"{context} tokens, batch {batch}: {name} has read a prompt in {read['seconds'][0]:.1f} s")
    for _ in range(contest.rounds + 1):
        for name, process in running.items():
            turns[name].append(process.ask("decode", tokens=contest.tokens))
    periods = {name: _over_periods(process, turns[name][-1], contest.tokens) for name, process in running.items()}
    return [
        {"contestant": name, "context": context, "batch": batch}
        | _figures(contest, name, machine, context, batch, prompts[name], turns[name], periods[name])
        for name in running
    ]


def _figures(
    contest: Contest,
    name: str,
    machine: Machine,
    context: int,
    batch: int,
    prompts: Sequence[Answer],
    turns: Sequence[Answer],
    period: Answer | None,
) -> dict[str, Any]:
    """What a contestant's answers come to: to prompts, to the turns it took, and to whole periods of evictions."""
    first, *rounds = turns
    last = rounds[-1]
    laps, ttft = _seconds(rounds), _seconds(prompts)
    evicting = [read["evicting_s"] for read in prompts if read.get("evicting_s") is not None]
    low, tpot, high = statistics.quantiles(laps if len(laps) > 1 else 2 * laps, n=4)
    ours = name not in PEERS
    held = (contest.config.weights if contest.weights == "auto" else contest.weights) if ours else None
    floor = decode_floor(contest.config, contest.dtype, machine, last["cache_bytes"], last["kept"], batch, held)
    newest = period or last
    return {
        "ttft_s": statistics.median(ttft) if ttft else None,
        "ttfts_s": ttft,
        "ttft_floor_s": prefill_floor(contest.config, machine, context, batch),
        "evicting_s": statistics.median(evicting) if evicting else None,
        "tpot_ms": 1e3 * tpot,
        "tpot_quartiles_ms": [1e3 * low, 1e3 * high],
        "tpot_with_evictions_ms": period and 1e3 * statistics.fmean(period["seconds"]),
        "tokens_per_s": batch / tpot,
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / tpot,
        "kept": last["kept"],
        "cache_bytes": last["cache_bytes"],
        "first_round_s": sum(first["seconds"]),
        "graphs": newest["graphs"],
        "new_graphs": newest["graphs"] - first["graphs"],
    }


def _seconds(answers: Sequence[Answer]) -> list[float]:
    return [lap for answer in answers for lap in answer["seconds"]]


def _over_periods(process: Process, last: Answer, least: int) -> Answer | None:
    """Tokens between two compactions, `least` or more and whole periods of them, with their evictions, which a median of single
    tokens leaves out; None for a method that evicts nothing while it decodes."""
    period = last.get("period")
    if not period:
        return None
    process.ask("decode", tokens=period)  # the first eviction of a process allocates what later ones find
    return process.ask("decode", tokens=period * -(-least // period))


def measure_memory(contest: Contest, report: Report = print, keep: Keep = lambda result: None) -> dict[str, Any]:
    """Peaks above what the loaded model takes, phase by phase: prefill, what stays after it, decode. JSON-ready.

    keep: called with the result so far after every row.
    """
    rows: list[dict[str, Any]] = []
    for context, batch, name in product(contest.contexts, contest.batches, contest.contestants):
        if not contest.takes_part(name, context):
            continue
        with closing(contest.start(name)) as process:
            process.ask("prefill", context=min(context, WARM_UP), batch=batch)
            process.ask("decode", tokens=2)
            base = process.ask("drop")["after_bytes"]
            prefill = process.ask("prefill", context=context, batch=batch)
            decode = process.ask("decode", tokens=contest.tokens)
        rows.append(
            {
                "contestant": name,
                "context": context,
                "batch": batch,
                "loaded_bytes": base,
                "prefill_peak_bytes": prefill["before_bytes"] + prefill["peak_above"] - base,
                "after_prefill_bytes": prefill["after_bytes"] - base,
                "decode_peak_bytes": decode["before_bytes"] + decode["peak_above"] - base,
                "cache_bytes": decode["cache_bytes"],
                "kept": decode["kept"],
            }
        )
        report(f"{context} tokens, batch {batch}, {name}: {rows[-1]['prefill_peak_bytes'] / 1e6:.1f} MB")
        keep(_result("memory", contest, rows))
    return _result("memory", contest, rows)


def _result(kind: str, contest: Contest, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("restkv", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "kind": kind,
        "contest": asdict(contest) | {"peer_python": bool(contest.peer_python)},
        "machine": described_machine() | {"threads": contest.threads},
        "versions": versions,
        "date": date.today().isoformat(),
        "rows": list(rows),
    }

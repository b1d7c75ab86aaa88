"""A folder of results: a manifest of how they were made, and one line of JSON per sample as it finishes.

    DIR/manifest.json    kind, arguments, methods, model, versions, machine
    DIR/samples.jsonl    one object per line; "key" says what it is the result of
    DIR/timings.jsonl    when each of them was finished and how long it took

A run that was killed goes on where it stopped: what is in samples.jsonl is not done again, and a line the kill left unfinished is
cut off. Everything that differs from one run to the next is kept out of samples.jsonl, so that an interrupted run
ends with the very file of an unbroken one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from restkv import __version__
from restkv.errors import PromptError, RestKVError

if TYPE_CHECKING:
    from bench.methods import Method
    from restkv.lm import LM

FORMAT = 1
MANIFEST, SAMPLES, TIMINGS = "manifest.json", "samples.jsonl", "timings.jsonl"

Report = Callable[[int, int], None]  # (rows done, rows in all)


class RunError(RestKVError):
    """A folder of results that cannot be written, read, or gone on with."""


@dataclass
class Run:
    """An open folder of results. Made by `open_run`.

    Attributes:
        done: the keys of the rows it has.
    """

    folder: Path
    manifest: dict[str, Any]
    done: set[str]
    _samples: IO[str]
    _timings: IO[str]
    _total: int
    _report: Report | None
    _lap: float = field(default_factory=time.perf_counter)

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a row, which is on the disk then, and report."""
        assert key not in self.done, f"{key} is done already"
        lap = time.perf_counter()
        timing = {"key": key, "seconds": round(lap - self._lap, 4), "finished": _now()}
        self._lap = lap
        try:
            _write_line(self._samples, {"key": key, **row})
            _write_line(self._timings, timing)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror}); rerun to go on") from None
        self.done.add(key)
        if self._report is not None:
            self._report(len(self.done), self._total)

    def add_together(self, keys: Sequence[str], make: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Add those of some rows that are missing; all are made, or none.

        Rows of one session are computed as one batch, and a batch of other rows may round otherwise: what a broken-off run
        is missing must come out of the batch that it would have come out of.
        """
        if all(key in self.done for key in keys):
            return
        for key, row in zip(keys, make(), strict=True):
            if key not in self.done:
                self.add(key, row)


@contextlib.contextmanager
def open_run(
    folder: Path,
    kind: str,
    arguments: Mapping[str, Any],
    details: Mapping[str, Any],
    total: int = 0,
    report: Report | None = None,
    may_grow: str | None = None,
) -> Iterator[Run]:
    """Begin a run in a folder, or go on with the one that is there.

    Args:
        kind: of run, a key of bench.report.TITLES.
        arguments: JSON-ready, all that results depend on; a folder is gone on with only where they are the same.
        details: JSON-ready, what else the manifest shall say.
        total: rows of the complete run.
        report: called after every row.
        may_grow: a number among the arguments that may be larger than it was: what it adds comes after all that is there.
    Raises:
        RunError: the folder cannot be written, is in use, or holds a run with other arguments or policies (named).
    """
    made = {"kind": kind, "arguments": dict(arguments), "versions": versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        samples, timings = ((folder / name).open("a+", encoding="utf-8") for name in (SAMPLES, TIMINGS))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    with samples, timings:
        try:
            fcntl.flock(samples, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except OSError:
            raise RunError(f"{folder}: another run is writing there; wait for it or choose another --out") from None
        for name in (SAMPLES, TIMINGS):
            _cut_unfinished_line(folder / name)
        path = folder / MANIFEST
        if path.exists() or (folder / SAMPLES).stat().st_size:
            manifest = read_manifest(folder)
            before, now = manifest.get("arguments", {}), json.loads(json.dumps(made))
            grown = may_grow in before and before[may_grow] < now["arguments"][may_grow]
            if grown:
                manifest = {**manifest, "arguments": {**before, may_grow: now["arguments"][may_grow]}}
            _require_same(folder, manifest, now)
            _require_same_policies(folder, manifest.get("methods", {}), details.get("methods", {}))
            if grown:
                _write_manifest(path, manifest)
        else:
            manifest = {"format": FORMAT, **made, **details, "machine": machine(), "started": _now()}
            _write_manifest(path, manifest)
        yield Run(folder, manifest, {row["key"] for row in read_rows(folder)}, samples, timings, total, report)


def digest(text: str) -> str:
    """A short name for exactly this text: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def setting(lm: LM) -> dict[str, Any]:
    """Which model, where and how: what the results of every run depend on, for its arguments."""
    from restkv.store import fingerprint

    return {"model": fingerprint(lm.model), "device": lm.device.type, "backend": lm.backend}


def describe(lm: LM, methods: Sequence[Method], entries: int) -> dict[str, Any]:
    """What a manifest says besides the arguments: the policies in full (budgets and windows are said by each row), the model."""
    from restkv.store import fingerprint

    config = lm.config
    return {
        "methods": {method.label: method.describe(entries) for method in methods},
        "model": {
            "fingerprint": fingerprint(lm.model),
            "family": config.family,
            "layers": config.num_layers,
            "heads": [config.num_heads, config.num_kv_heads, config.head_dim],
            "max_positions": config.max_positions,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "bytes_per_token": config.kv_bytes_per_token(lm.dtype),
        },
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of results.

    Raises:
        RunError: there is none, or not of this format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    except ValueError:
        raise RunError(f"{path}: not a manifest; name the folder of a run") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{path}: not a manifest of format {FORMAT}; run the bench again with this version")
    return manifest


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All finished rows of a folder, also of one that is being written to.

    Raises:
        RunError: a line is no JSON object with a key, or has the key of an earlier one (it is named).
    """
    path = folder / SAMPLES
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "key" not in row:
            raise RunError(f"{path}: line {number} is not a result; delete it and run again")
        if row["key"] in rows:
            raise RunError(f"{path}: line {number} repeats the result {row['key']!r}; delete it")
        rows[row["key"]] = row
    return list(rows.values())


def chosen_rows(count: int, fraction: float, limit: int | None) -> list[int]:
    """Numbers of a file's rows that are run: a share of them spread evenly over it, at least one, and of these the first `limit`.

    Raises:
        PromptError: a share or a limit that leaves nothing.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit {limit}: give at least 1")
    if not 0 < fraction <= 1:
        raise PromptError(f"fraction {fraction:g}: give a number above 0, at most 1")
    some = min(count, max(1, round(count * fraction)))
    return [index * count // some for index in range(some)][:limit]


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    return {"restkv": __version__} | {name: version(name) for name in ("torch", "tokenizers", "numpy")}


@cache  # every row says them, and looking them up reads files
def versions_text() -> str:
    """The versions as every row says them."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def machine() -> dict[str, Any]:
    """What the run was made on: processor, cores, memory, accelerator."""
    import torch

    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _require_same(folder: Path, manifest: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse to mix two runs in one folder, naming the first argument in which they differ."""

    def flat(part: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": part.get("kind"), **part.get("arguments", {}), **part.get("versions", {})}

    before, now = flat(manifest), flat(made)
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            was, is_ = (json.dumps(part.get(name), ensure_ascii=False) for part in (before, now))
            raise RunError(f"{folder}: holds a run with {name} {was}, this one has {is_}; choose another --out")


def _require_same_policies(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on where defaults or the code of a policy have changed: a plugin's version is not among the versions."""
    for label, method in json.loads(json.dumps(now)).items():
        was, is_ = (
            {**part.get("policy", {}), "source": part.get("source")} for part in (before.get(label, {}), method)
        )
        for name, value in is_.items():
            if label in before and was.get(name) != value:
                pair = f"{json.dumps(was.get(name))}, this one has {json.dumps(value)}"
                raise RunError(f"{folder}: holds a run with {label}'s {name} {pair}; choose another --out")


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _cut_unfinished_line(path: Path) -> None:
    """Drop what a kill left of the last line."""
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _write_line(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

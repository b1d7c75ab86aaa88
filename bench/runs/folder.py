"""A folder of results: a manifest of how they were made, and one line of JSON per sample as it finishes.

    DIR/manifest.json    kind, arguments, methods, model, versions, machine
    DIR/samples.jsonl    one object per line; "key" says what it is the result of
    DIR/timings.jsonl    when each of them was finished and how long it took

A run that was killed goes on where it stopped: what is in samples.jsonl is not done again, and a line the kill left unfinished is
cut off. Everything that differs from one run to the next is kept out of samples.jsonl, so that an interrupted run
ends with the very file of an unbroken one.

Every line of samples.jsonl ends with a check value: a digest of the result and of the run's arguments, which the manifest has as
"check". A result that was changed later, or comes from another run, is refused by name. Folders made before there were check
values have no such manifest; they are read as they are.
"""

from __future__ import annotations

import contextlib
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
from typing import Any, BinaryIO

from bench.runs.lines import RunError as RunError
from bench.runs.lines import append_line, check_value, cut_unfinished_line, lines, lock, opened
from bench.runs.rows import FORMAT, READERS, Row
from bench.runs.schema import GENERAL, require
from restkv import __version__
from restkv.errors import OutputError, PromptError
from restkv.files import refusal, write_text
from restkv.saving.strict_json import parse, shown

MANIFEST, SAMPLES, TIMINGS = "manifest.json", "samples.jsonl", "timings.jsonl"
MOST_MANIFEST = 16 << 20  # bytes

Report = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass
class Run:
    """An open folder of results. Made by `open_run`.

    Attributes:
        done: the keys of the rows it has.
    """

    folder: Path
    manifest: dict[str, Any]
    done: set[str]
    _samples: BinaryIO
    _timings: BinaryIO
    _total: int
    _report: Report | None
    _lap: float = field(default_factory=time.perf_counter)

    def add(self, key: str, row: Row | Mapping[str, Any]) -> None:
        """Write a row, which is on the disk then, and report."""
        if isinstance(row, Row):
            row = {**row.line(), "versions": versions_text()}
        assert key not in self.done, f"{key} is done already"
        lap = time.perf_counter()
        timing = {"key": key, "seconds": round(lap - self._lap, 4), "finished": _now()}
        self._lap = lap
        append_line(self.folder / SAMPLES, self._samples, {"key": key, **row}, self.manifest.get("check"))
        append_line(self.folder / TIMINGS, self._timings, timing)
        self.done.add(key)
        if self._report is not None:
            self._report(len(self.done), self._total)

    def add_together(self, keys: Sequence[str], make: Callable[[], Sequence[Row | Mapping[str, Any]]]) -> None:
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
        kind: of run, the name of a benchmark.
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
    except FileExistsError:
        raise RunError(f"{folder}: cannot be written (it is a file); choose another --out") from None
    except OSError as error:
        raise RunError(str(refusal(folder, error, "choose another --out"))) from None
    except ValueError:
        raise RunError(f"{str(folder)!r}: no folder can have this name; choose another --out") from None
    with opened(folder / SAMPLES) as samples, opened(folder / TIMINGS) as timings:
        lock(folder, samples)
        for file in (samples, timings):
            cut_unfinished_line(file)
        path = folder / MANIFEST
        if path.exists() or (folder / SAMPLES).stat().st_size:
            manifest = read_manifest(folder)
            if manifest["format"] != FORMAT:
                raise RunError(
                    f"{folder}: holds a run of format {manifest['format']}, this version writes {FORMAT}; choose another --out"
                )
            found, was = manifest, manifest.get("arguments", {}).get(may_grow)
            if may_grow is not None and type(was) is int and was < arguments[may_grow]:
                manifest = {**found, "arguments": {**found["arguments"], may_grow: arguments[may_grow]}}
            _require_same(folder, manifest, json.loads(json.dumps({**made, "methods": details.get("methods", {})})))
            if manifest is not found:
                _write_manifest(path, manifest)
        else:
            lasting = {name: value for name, value in arguments.items() if name != may_grow}
            check = digest(json.dumps([kind, lasting], sort_keys=True))
            manifest = {"format": FORMAT, **made, **details, "machine": machine(), "started": _now(), "check": check}
            _write_manifest(path, manifest)
        yield Run(folder, manifest, {row["key"] for row in read_rows(folder)}, samples, timings, total, report)


def digest(text: str) -> str:
    """A short name for exactly this text: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of results.

    Raises:
        RunError: there is none, or not of this format, or it has something of a wrong type.
    """
    path = folder / MANIFEST
    text = b"".join(lines(path, MOST_MANIFEST))
    try:
        manifest = parse(text.decode())
    except ValueError:
        raise RunError(f"{path}: not a manifest; name the folder of a run") from None
    said = manifest.get("format") if isinstance(manifest, dict) else None
    if type(said) is not int or said not in READERS:
        known = " or ".join(map(str, READERS))
        raise RunError(f"{path}: not a manifest of format {known}; run the bench again with this version")
    try:
        require(GENERAL, manifest, all_of_them=False)
    except ValueError as error:
        raise RunError(f"{path}: not as a bench writes it ({error}); run the bench again into another folder") from None
    return manifest


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All finished rows of a folder, also of one that is being written to, in this version's format and without check values.

    Raises:
        RunError: a line is no JSON object with a key, has the key of an earlier one, or is not as it was written (it is named).
    """
    path = folder / SAMPLES
    try:
        manifest = read_manifest(folder)
    except RunError:
        manifest = {}  # whoever makes something of the rows needs the manifest too, and says what is wrong with it
    check, kind, current = manifest.get("check"), manifest.get("kind", ""), READERS[manifest.get("format", FORMAT)]
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines(path), 1):
        if not line.endswith(b"\n"):
            break  # unfinished
        try:
            row = parse(line.decode())
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise RunError(f"{path}: line {number} is not a result; delete it and run again")
        key, said = row["key"], row.pop("check", None)
        if check is not None and said is None:
            raise RunError(f"{path}: line {number} has no check value, so no run wrote it; delete it and run again")
        if check is not None and said != check_value(row, check):
            raise RunError(
                f"{path}: line {number}, the result {shown(key)}, was changed after it was written, or is another run's; "
                "delete it and run again"
            )
        if key in rows:
            raise RunError(f"{path}: line {number} repeats the result {shown(key)}; delete it")
        rows[key] = current(kind, row)
    return list(rows.values())


def chosen_rows(count: int, fraction: float, limit: int | None) -> list[int]:
    """Numbers of a file's rows that are run: a share spread evenly over it, at least one, and of these the first `limit`."""
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


def _require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to mix two runs in one folder, naming the first thing in which their manifests differ."""
    was, is_ = _settings(before), _settings(now)
    for name in [*is_, *was]:
        if was.get(name) != is_.get(name):
            old, new = (json.dumps(part.get(name), ensure_ascii=False) for part in (was, is_))
            raise RunError(f"{folder}: holds a run with {name} {old}, this one has {new}; choose another --out")


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What results depend on, by name. A policy's defaults or code may change: a plugin's version is not among the versions."""
    found = {"kind": manifest.get("kind"), **manifest.get("arguments", {}), **manifest.get("versions", {})}
    for label, method in manifest.get("methods", {}).items():
        said = {**method.get("policy", {}), "source": method.get("source")}
        found |= {f"{label}'s {name}": value for name, value in said.items()}
    return found


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    try:
        write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    except OutputError as error:
        raise RunError(str(error)) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

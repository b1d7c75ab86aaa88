"""What a report shows of a run, by its kind; whatever part of its rows there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.runs.benchmark import Line, Part, benchmark, names
from bench.runs.folder import MANIFEST, SAMPLES, RunError, read_manifest, read_rows
from bench.runs.schema import MADE, many, name, require, require_row, whole
from restkv.errors import RestKVError
from restkv.saving.strict_json import shown


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest of a run and its rows, in which all that parts and pages are made of is there and of its type."""
    manifest, rows = read_manifest(folder), read_rows(folder)
    with _written_by_a_bench(f"{folder / MANIFEST}: ", "run the bench again into another folder"):
        require(MADE, manifest)
    kind, arguments = manifest["kind"], manifest["arguments"]
    if kind not in names():
        raise RunError(f"{folder}: a run of kind {shown(kind)}; pages are made of {', '.join(names())}")
    found = benchmark(kind)
    counted = {} if found.may_grow else {"results": whole()}
    with _written_by_a_bench(f"{folder / MANIFEST / 'arguments'}: ", "run the bench again into another folder"):
        require({"methods": many(name, 1), **counted, **found.arguments}, arguments)
    for row in rows:
        what = f"{folder}: in the result {shown(row['key'])}, "
        with _written_by_a_bench(what, f"delete its line of {SAMPLES} and run again"):
            require_row(found.rows, arguments, row)
    return manifest, rows


@contextmanager
def _written_by_a_bench(place: str, mend: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunError(f"{place}{error}, not as a bench writes it; {mend}") from None


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Around whatever makes tables or figures of rows: that these do not fit together is a RunError."""
    try:
        yield
    except RestKVError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            f"{what} cannot be made: the results do not fit together ({said}); run the bench again"
        ) from error


def parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Line]) -> list[Part]:
    """Tables and figures of a run, in reading order."""
    with fitting("tables"):
        return benchmark(kind).parts(arguments, rows) if rows else []


def progress(kind: str, arguments: Mapping[str, Any], rows: Sequence[Line]) -> tuple[int, int]:
    """Rows there are, and rows of the complete run."""
    return len(rows), benchmark(kind).total(arguments)


def draw_pictures(folder: Path) -> list[Path]:
    """The files that a run's benchmark draws beside its page, if any."""
    manifest, rows = read_run(folder)
    pictures = benchmark(manifest["kind"]).pictures
    if pictures is None:
        return []
    with fitting("pictures"):
        return pictures(rows, folder)

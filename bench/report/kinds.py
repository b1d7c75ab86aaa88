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
    """The manifest of a run and its rows, in which all that parts and pages are made of is there and of its type.

    Raises:
        RunError: something is not, or the run is of a kind that has no page (it is named).
    """
    manifest, rows = read_manifest(folder), read_rows(folder)
    place = folder / MANIFEST
    try:
        require(MADE, manifest)
        kind = manifest["kind"]
        if kind not in names():
            raise RunError(f"{folder}: a run of kind {shown(kind)}; pages are made of {', '.join(names())}")
        place, found = place / "arguments", benchmark(kind)
        counted = {} if found.may_grow else {"results": whole()}
        require({"methods": many(name, 1), **counted, **found.arguments}, manifest["arguments"])
    except KeyError as error:
        raise RunError(f"{place}: has no {error}; run the bench again into another folder") from None
    except ValueError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{place}: {error}, not as a bench writes it; run it again into another folder") from None
    for row in rows:
        try:
            require_row(found.rows, manifest["arguments"], row)
        except KeyError as error:
            raise RunError(
                f"result {shown(row['key'])} has no {error}; delete its line of {SAMPLES} and run again"
            ) from None
        except ValueError as error:
            raise RunError(
                f"{folder}: in the result {shown(row['key'])}, {error}; delete its line of {SAMPLES} and run again"
            ) from None
    return manifest, rows


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Around whatever makes tables or figures of rows.

    Raises:
        RunError: they do not fit together.
    """
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
    """Tables and figures of a run, in reading order.

    Raises:
        RunError: rows that do not fit together.
    """
    with fitting("tables"):
        return benchmark(kind).parts(arguments, rows) if rows else []


def progress(kind: str, arguments: Mapping[str, Any], rows: Sequence[Line]) -> tuple[int, int]:
    """Rows there are, and rows of the complete run."""
    return len(rows), benchmark(kind).total(arguments)


def draw_pictures(folder: Path) -> list[Path]:
    """The files that a run's benchmark draws beside its page, if any.

    Raises:
        RunError: see read_run. OutputError: one cannot be written.
    """
    manifest, rows = read_run(folder)
    pictures = benchmark(manifest["kind"]).pictures
    if pictures is None:
        return []
    with fitting("pictures"):
        return pictures(rows, folder)

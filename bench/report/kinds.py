"""What a report shows of a run, by its kind; whatever part of its rows there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.published import tables as official
from bench.report import likelihood as tables_likelihood
from bench.report.tables import Part, Row, fidelity_parts, needle_parts, ruler_parts
from bench.runs.folder import MANIFEST, SAMPLES, RunError, read_manifest, read_rows
from bench.runs.schema import ARGUMENTS, MADE, require, require_row
from restkv.errors import RestKVError
from restkv.saving.strict_json import shown

MAKERS = {
    "ruler": ruler_parts,
    "needle": needle_parts,
    "fidelity": fidelity_parts,
    **tables_likelihood.MAKERS,
}


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
        if kind not in ARGUMENTS:
            raise RunError(f"{folder}: a run of kind {shown(kind)}; pages are made of {', '.join(ARGUMENTS)}")
        place = place / "arguments"
        require(ARGUMENTS[kind], manifest["arguments"])
    except KeyError as error:
        raise RunError(f"{place}: has no {error}; run the bench again into another folder") from None
    except ValueError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{place}: {error}, not as a bench writes it; run it again into another folder") from None
    for row in rows:
        try:
            require_row(kind, manifest["arguments"], row)
        except KeyError as error:
            raise _lacking(row["key"], error) from None
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
    except (RestKVError, KeyError):
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            f"{what} cannot be made: the results do not fit together ({said}); run the bench again"
        ) from error


def parts(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Tables and figures of a run, in reading order.

    Raises:
        RunError: a row lacks something (it is named).
    """
    if not rows:
        return []
    make = partial(official.parts, kind) if kind in official.TITLES else MAKERS[kind]
    try:
        with fitting("tables"):
            return make(arguments, rows)
    except KeyError as error:
        whole = [row for row in rows if error.args[0] in row]
        if not whole or len(whole) == len(rows):
            raise  # not a row that lacks what others have
        raise _lacking(next(row["key"] for row in rows if error.args[0] not in row), error) from None


def _lacking(key: str, error: KeyError) -> RunError:
    return RunError(f"result {shown(key)} has no {error}; delete its line of {SAMPLES} and run again")


def progress(kind: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> tuple[int, int]:
    """Rows there are, and rows of the complete run."""
    if "results" in arguments:
        return len(rows), arguments["results"]
    evicting = len(arguments["methods"]) - 1  # all but the full cache
    modes = 2 if arguments["question"] == "both" else 1
    places = len(arguments["tasks"]) * len(arguments["lengths"]) * len(arguments["depths"])
    cells = 1 + evicting * len(arguments["compression"])
    return len(rows), arguments["samples"] * places * modes * cells

"""Prompt templates from the user's clone of a benchmark's repository, recognised by hash; else our own wording.

JSON files are read; Python files are parsed with `ast` and never run: texts that stand in dictionaries or as defaults of
parameters are taken, and of formatted strings the literal parts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.runs.jsonl import DataError
from modeling.files import read_bytes

RECOGNISED, UNKNOWN, OWN = "official (recognised)", "given (not recognised)", "own wording"

FILES = {
    "longbench": ("dataset2prompt.json", "run_longbench.py"),
    "infinitebench": ("prompt.py", "eval_utils.py", "run_infinite_bench.py"),
    "needle-official": ("run_needle_in_haystack.py",),
}


@dataclass(frozen=True)
class Template:
    """A text with {fields}, and where it comes from: RECOGNISED, UNKNOWN or OWN."""

    name: str
    text: str
    source: str

    def fill(self, fields: Mapping[str, str]) -> str:
        """The text with its fields filled in. Only plain names are fields: a template is a stranger's text."""
        parts = []
        try:
            for literal, name, form, conversion in string.Formatter().parse(self.text):
                parts.append(literal)
                if name is not None:
                    if name not in fields or form or conversion:
                        raise DataError(
                            f"template {self.name!r}: there is no field {{{name}}}; it may have {', '.join(sorted(fields))}"
                        )
                    parts.append(fields[name])
        except ValueError as error:
            raise DataError(f"template {self.name!r}: {error}; double the braces that are none of a field") from None
        return "".join(parts)


def find_templates(
    kind: str, path: Path | None, hashes: Mapping[str, str], own: Mapping[str, str]
) -> tuple[dict[str, Template], str | None]:
    """Templates by name, and the digest of the file they come from (None: our own wording).

    Args:
        kind: a key of FILES.
        path: a file, or a folder in which one of FILES[kind] is looked for; None takes `own`.
        hashes: of the published texts, by name: the first 12 hex digits of their SHA-256.
    """
    if path is None:
        return {name: Template(name, own[name], OWN) for name in hashes}, None
    file = _find(path, FILES[kind])
    try:
        content = read_bytes(file, DataError)
        texts = _from_json(content) if file.suffix == ".json" else _from_python(content)
    except DataError:
        raise
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the last two: brackets within each other
        raise DataError(f"{file}: neither JSON nor Python ({error}); name the file with the templates") from None
    found = {}
    for name, digest in hashes.items():
        candidates = texts.get(name, [])
        if not candidates:
            raise DataError(f"{file}: has no template {name!r}; name the file with the templates of {kind}")
        known = next((text for text in candidates if sha12(text) == digest), None)
        if known is None and len(set(candidates)) > 1:
            raise DataError(
                f"{file}: several texts for {name!r}, none of them known; give a JSON file with one of each"
            )
        found[name] = Template(name, known or candidates[0], RECOGNISED if known else UNKNOWN)
    return found, hashlib.sha256(content).hexdigest()[:16]


def sha12(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _find(path: Path, names: Sequence[str]) -> Path:
    if not path.is_dir():
        return path
    for name in names:
        if found := sorted(path.rglob(name)):
            return found[0]
    raise DataError(f"{path}: no {' or '.join(names)} in this folder; name the clone or the file with --templates")


def _from_json(content: bytes) -> dict[str, list[str]]:
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return {name: [text] for name, text in values.items() if isinstance(text, str)}


def _from_python(content: bytes) -> dict[str, list[str]]:
    """Texts by key of a dictionary or by parameter; formatted strings that say a context and a question as "prompt"."""
    texts: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(content)):
        for name, value in _named(node):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts.setdefault(name, []).append(value.value)
        if isinstance(node, ast.JoinedStr):
            text = "".join(_piece(part) for part in node.values)
            if "{context}" in text and "{retrieval_question}" in text:
                texts.setdefault("prompt", []).append(text)
    return texts


def _named(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.arguments):
        given = [*node.posonlyargs, *node.args]
        yield from ((arg.arg, value) for arg, value in zip(reversed(given), reversed(node.defaults), strict=False))


def _piece(part: ast.expr) -> str:
    """A literal part as it is, a filled-in name or attribute as {name}."""
    if isinstance(part, ast.Constant):
        return str(part.value).replace("{", "{{").replace("}", "}}")
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return "{%s}" % (
        value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else "?"
    )

"""What code, tests and documents refer to is there: files, modules and their names, sections of a page, links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import restkv

ROOT = Path(restkv.__file__).parents[1]
FOLDERS = ("modeling", "restkv", "bench", "tests", "docs", "examples")
PAGES = [*sorted(ROOT.glob("*.md")), *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.md")))]
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
TEXTS = [p for p in (*PAGES, *SOURCES, ROOT / "pyproject.toml", ROOT / ".ci" / "run") if p != Path(__file__)]

SUFFIXES = "py|md|json|toml|cff|txt"
HEADING = re.compile(r"^#+ (.+)$", re.M)
LINK = re.compile(r"\[[^][]*\]\(([^()\s]+)\)")
SECTION = re.compile(r"§(\d+(?:\.\d+)*)(?:,? (?:items?|bugs?) (\d+)(?:(?: and |-| to )(\d+))?| ([a-z])\b)?")
PAGE = re.compile(r"([\w-]+)\.md\b")
FILE = re.compile(rf"(?<![\w./<>{{}}*$-])(?=\w)((?:[\w.-]+/)*[\w-]+\.(?:{SUFFIXES}))\b(?![*{{}}(/])")
TICKED = re.compile(r"`([^`\n]+)`")
GROUP = re.compile(r'entry-points\."([\w.]+)"')
DOTTED = re.compile(r"^(restkv|modeling|bench)(\.\w+)+$")
ENTRY = re.compile(r'"((?:restkv|modeling|bench)[\w.]*):(\w+)"')

# Files of a checkpoint, of other projects and of users, of which pages speak.
FOREIGN = frozenset(
    """
    config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    manifest.json made.json dataset2prompt.json prompt.py eval_utils.py run_needle_in_haystack.py run_longbench.py
    run_infinite_bench.py prose.txt
    """.split()
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def sections(page: Path) -> dict[str, str]:
    """The text of each numbered section, those below it included."""
    heads = [(m[1], len(m[0].split()[0]), m.start()) for m in HEADING.finditer(read(page))]
    found = {}
    for at, (title, level, start) in enumerate(heads):
        if number := re.match(r"\d+(?:\.\d+)*", title):
            end = next((s for _, lower, s in heads[at + 1 :] if lower <= level), len(read(page)))
            found[number[0]] = read(page)[start:end]
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    titles = (re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", m[1]).lower() for m in HEADING.finditer(read(page)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def prose(path: Path) -> str:
    """A page without its code blocks; of a source file all of it."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.M | re.S) if path.suffix == ".md" else read(path)


def test_sections() -> None:
    """A § belongs to the page named last before it, and in a page that names none to that page itself."""
    lost = []
    for path in TEXTS:
        text = read(path)
        for match in SECTION.finditer(text):
            named = PAGE.findall(text, max(0, match.start() - 200), match.start())
            page = ROOT / "docs" / f"{named[-1]}.md" if named else path
            body = sections(page).get(match[1]) if page.suffix == ".md" and page.exists() else None
            items = filter(None, (match[2], match[3], match[4]))
            if body is None or not all(re.search(rf"^{item}\. ", body, re.M) for item in items):
                lost.append(f"{name(path)}: {match[0]} of {name(page)}")
    assert not lost


def test_links() -> None:
    lost = []
    for path in PAGES:
        for target in LINK.findall(prose(path)):
            file, _, anchor = target.partition("#")
            page = (path.parent / file).resolve() if file else path
            if "://" not in target and not (page.exists() and (not anchor or anchor in anchors(page))):
                lost.append(f"{name(path)}: {target}")
    assert not lost


@cache
def ours() -> frozenset[str]:
    """Every path of a file of ours, and every end of such a path."""
    paths = [p for p in ROOT.glob("*") if p.is_file()]
    paths += [p for folder in (*FOLDERS, ".ci") for p in (ROOT / folder).rglob("*") if p.is_file()]
    parts = [p.relative_to(ROOT).parts for p in paths if "__pycache__" not in p.parts]
    return frozenset("/".join(part[at:]) for part in parts for at in range(len(part)))


def files(path: Path) -> Iterator[str]:
    """Files that a page names in backticks, and whatever a text names from one of our folders on; NAME stands for any."""
    if path.suffix == ".md":
        for ticked in TICKED.findall(prose(path)):
            yield from FILE.findall(ticked) if " " not in ticked else ()
    for file in FILE.findall(prose(path)):
        if file.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            yield file


def test_files() -> None:
    lost = []
    for path in TEXTS:
        if path.name != "CHANGELOG.md":  # a history names what was
            absent = {
                file
                for file in files(path)
                if file not in ours() and Path(file).stem != "NAME" and Path(file).name not in FOREIGN
            }
            lost += [f"{name(path)}: {file}" for file in sorted(absent)]
    assert not lost


def defined(module: Path) -> set[str]:
    """The names at the top of a module, those that it imports or lists in __all__ included."""
    found = set()
    for node in ast.walk(ast.parse(read(module))):
        match node:
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.ImportFrom() | ast.Import():
                found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            case ast.Constant(value=str(text)):
                found.add(text)
    return found


def resolves(dotted: str) -> bool:
    place, parts = ROOT, dotted.split(".")
    for at, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
        elif (module := place / f"{part}.py").is_file():
            return at + 1 == len(parts) or parts[at + 1] in defined(module)
        else:
            module = place / "__init__.py"
            return module.is_file() and part in defined(module)
    return (place / "__init__.py").is_file() or place.is_dir()


def test_names() -> None:
    """Dotted names of a page in backticks (`restkv.lm.LM`), and the entry points of pyproject.toml."""
    project = read(ROOT / "pyproject.toml")
    groups = {*GROUP.findall(project), "restkv.policies"}  # of entry points; the last is for other packages
    lost = [":".join(entry) for entry in ENTRY.findall(project) if not resolves(".".join(entry))]
    for path in PAGES:
        if path.name != "CHANGELOG.md":
            dotted = {t for t in TICKED.findall(prose(path)) if DOTTED.match(t)}
            lost += [f"{name(path)}: {t}" for t in sorted(dotted - groups) if not resolves(t)]
    assert not lost


def test_nothing_cites_a_plan_outside_of_the_repository() -> None:
    cited = re.compile(r"\b(?:SPEC|FLEX|DESIGN|HOUSE|STYLE|USERS|FORESIGHT|TRUST)(?:\.md\b| §| bugs?\b)")
    found = [name(p) for p in TEXTS if cited.search(read(p))]
    assert not found


def test_the_documents_are_all_listed() -> None:
    listed = set(LINK.findall(read(ROOT / "docs" / "README.md")))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed

"""Pages from results: of any part of a run, with the numbers that are in it, and nothing that needs a script or a network."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from bench.report.figures import Grid, Line, Panel, heat_maps, line_panels, save_png, style
from bench.report.kinds import parts, progress
from bench.report.page import build, write_report
from bench.report.stats import Estimate, mean_interval
from bench.report.tables import Drawing, Table
from bench.runs.folder import MANIFEST, SAMPLES, TIMINGS, RunError, read_manifest, read_rows
from make.result_rows import KINDS, RULER, ruler_rows
from restkv.cli import main
from restkv.errors import OutputError


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(kind, part of the rows): a folder as a run would have left it."""

    def make(kind: str, share: float = 1.0) -> Path:
        arguments, make_rows = KINDS[kind]
        rows = make_rows(arguments)
        rows = rows[: round(share * len(rows))]
        manifest = {
            "format": 2,
            "kind": kind,
            "arguments": arguments,
            "versions": {"restkv": "0", "torch": "2"},
            "methods": {
                label: {"preset": None, "policy": {"name": label, "text": "<b>&"}} for label in arguments["methods"]
            },
            "model": {"fingerprint": "llama-<x>"},
            "machine": {"cores": 2},
            "started": "2026-01-01",
        }
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        (tmp_path / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"key": "half')
        (tmp_path / TIMINGS).write_text(
            '{"key": "a", "seconds": 1800}\n{"key": "b", "seconds": 1800}\n{"key": "c", "sec'
        )
        return tmp_path

    return make


class Page(HTMLParser):
    """Tags, attributes and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", (1.0, 0.6, 0.02, 0.0))
def test_a_page_comes_of_any_part_of_a_run(folder: Callable[..., Path], kind: str, share: float) -> None:
    page = Page(build(folder(kind, share)))
    assert not page.open  # every tag is closed
    assert ("Partial run" in page.text) == (share < 1)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (share == 0) or page.rows
    assert len(images) == {"ruler": 2, "needle": 1, "fidelity": 3}[kind] or share < 0.5
    for image in images:
        assert image["alt"]
        kind_of, _, data = str(image["src"]).partition(",")
        assert kind_of == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_no_script_and_no_network(folder: Callable[..., Path], kind: str) -> None:
    text = build(folder(kind))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or str(value).startswith("data:"), (tag, name)
    assert "url(" not in text and "@import" not in text
    for _, attributes in page.tags:
        source = str(attributes.get("src", ""))
        if source.startswith("data:"):
            drawing = base64.b64decode(source.partition(",")[2]).decode()
            assert "<script" not in drawing
            assert not [
                word
                for word in drawing.split('"')
                if word.startswith("http") and "xlink" not in word and "w3.org" not in word
            ]


def test_names_from_outside_are_text_and_not_html(folder: Callable[..., Path]) -> None:
    text = build(folder("ruler"))
    assert "llama-&lt;x&gt;" in text and "&lt;b&gt;&amp;" in text and "<b>" not in text


def test_the_tables_of_a_retrieval_run(folder: Callable[..., Path]) -> None:
    rows = Page(build(folder("ruler"))).rows
    head = ["method", "at", "kept", "niah_single", "vt", "mean [95 %]", "minus full [95 %]", "n"]
    assert rows.count(head) == 4  # two lengths, two questions
    at = rows.index(head)
    full, ours, theirs = rows[at + 1 : at + 4]
    assert full == ["full", "1x", "256", "1.000", "1.000", "1.000 [1.000, 1.000]", "", "8"]
    assert ours[:5] == ["restkv", "8x", "32", "0.750", "0.750"] and ours[7] == "8"
    expected = mean_interval([0.5, 1, 0.5, 1], [0.5, 1, 0.5, 1])
    assert ours[5] == str(expected)
    assert ours[6] == mean_interval([-0.5, 0, -0.5, 0], [-0.5, 0, -0.5, 0]).show(sign="+")
    assert theirs[0] == "snapkv@official" and theirs[6] == "-1.000 [-1.000, -1.000]"
    assert [row[1] for row in rows[at + 1 : at + 6]] == ["1x", "8x", "8x", "16x", "16x"]
    assert rows[0] == ["method", "8x", "16x"] and rows[1] == ["full", full[5], full[5]]  # the overview
    assert rows[2] == ["restkv", ours[5], rows[at + 4][5]]


def test_one_method_alone_has_no_overview() -> None:
    rows = [row for row in ruler_rows(RULER) if row["method"] == "full"]
    captions = [part.caption for part in parts("ruler", RULER, rows)]
    assert [caption.partition(" ")[0] for caption in captions] == ["256", "256", "512", "512"]
    assert not any("mean over tasks" in caption for caption in captions)


def test_a_part_of_a_run_says_how_much_is_behind_each_number(folder: Callable[..., Path]) -> None:
    page = Page(build(folder("ruler", 0.3)))
    total = len(ruler_rows(RULER))
    assert f"Partial run: {round(0.3 * total)} of {total} results" in page.text
    assert "1.00 h" in page.text
    counts = [int(row[-1]) for row in page.rows if row[-1].isdigit()]
    assert sum(counts) == round(0.3 * total) and set(counts) != {8}


def test_the_tables_of_a_fidelity_run(folder: Callable[..., Path]) -> None:
    rows = Page(build(folder("fidelity"))).rows
    assert rows[0][3:7] == ["KL, nats/token", "top-1 agreement", "perplexity ratio", "layer error"]
    assert rows[1][:4] == ["restkv", "32", "32", "0.0156 [0.0156, 0.0156]"]
    assert rows[1][5].startswith(f"{np.exp(2 * 0.5 / 32):.3f} [") and rows[1][6].startswith(f"{0.15 / 32:.3f}")
    assert rows[3][6] == "positions renumbered" and rows[4][1] == "64"
    oracle = rows[next(i for i, row in enumerate(rows) if "future oracle" in row) + 1 :][:4]
    assert [row[0] for row in oracle] == ["restkv", "snapkv@official"] * 2
    assert oracle[0][1] == "16" and oracle[0][6].startswith("0.625") and oracle[0][-1] == "1"
    by_layer = rows[rows.index(["method", "budget", "set", "layer 0", "layer 1"]) + 1 :]
    assert by_layer[:2] == [
        ["restkv", "16", "its set", f"{0.1 / 16:.3f}", f"{0.2 / 16:.3f}"],
        ["restkv", "16", "window oracle", f"{0.05 / 16:.3f}", f"{0.1 / 16:.3f}"],
    ]
    assert len(by_layer) == 4 * 3  # two budgets of two methods; positions renumbered have none


def test_a_result_that_lacks_something_is_named(folder: Callable[..., Path]) -> None:
    run = folder("ruler", 0.5)
    whole = (run / SAMPLES).read_text().rpartition("\n")[0]
    (run / SAMPLES).write_text(f'{whole}\n{{"key": "foo"}}\n')
    with pytest.raises(RunError, match=r"in the result 'foo', '\w+' is missing, .*; delete its line of samples\.jsonl"):
        build(run)


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_the_rows_of_a_whole_run(kind: str) -> None:
    arguments, make_rows = KINDS[kind]
    rows = make_rows(arguments)
    assert progress(kind, arguments, rows) == (len(rows), len(rows))
    assert parts(kind, arguments, []) == []


def test_the_command_rebuilds_page_and_heat_maps(
    folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder("needle", 0.4)
    before = (place / SAMPLES).read_bytes()
    assert main(["bench", "report", str(place)]) == 0
    assert capsys.readouterr().out.split() == [
        *(str(place / f"needle-aware-{name}.png") for name in ("full", "restkv", "snapkv-official")),
        str(place / "needle-aware.png"),
        str(place / "report.html"),
    ]
    first = (place / "report.html").read_bytes()
    assert main(["bench", "report", str(place)]) == 0
    assert (place / "report.html").read_bytes() == first and (place / SAMPLES).read_bytes() == before
    capsys.readouterr()
    shutil.rmtree(place)
    assert main(["bench", "report", str(place)]) == 2
    assert "name the folder of a run" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_how_to_get_it(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder("ruler")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    commands = (
        ["report", str(place)],
        ["needle", "--samples", "1", "--out", str(place / "needle")],
        ["kept", "--out", str(place / "kept.png")],
    )
    for command in commands:
        assert main(["bench", *command]) == 2
        error = capsys.readouterr().err
        assert error == "restkv: error: figures need matplotlib; install it with: pip install 'restkv[plot]'\n"
    assert not (place / "report.html").exists() and not (place / "needle").exists()
    tables = [part for part in parts("ruler", RULER, ruler_rows(RULER)) if isinstance(part, Table)]
    assert len(tables) == 8  # tables need none


def test_a_page_that_cannot_be_written_is_named(folder: Callable[..., Path]) -> None:
    place = folder("ruler")
    (place / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html: cannot be written"):
        write_report(place)
    with pytest.raises(RunError, match="cannot be read"):
        write_report(place / "none")
    (place / MANIFEST).write_text((place / MANIFEST).read_text().replace('"kind": "ruler"', '"kind": "speed"'))
    with pytest.raises(RunError, match="a run of kind 'speed'; pages are made of ruler, needle, fidelity"):
        build(place)


# -- figures


def test_no_two_methods_look_alike_without_colour() -> None:
    looks = [style(index) for index in range(28)]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 28


def test_maps_darken_with_the_value_and_tell_what_is_missing(tmp_path: Path) -> None:
    figure = heat_maps([Grid("a", ["0%", "100%"], ["8", "16"], [[0.0, 1.0], [None, 0.5]])], "r", "c", "v")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "·", "0.5"]
    mapped = axes.images[0].cmap(np.linspace(0, 1, 9))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(mapped) > 0).all()  # brightness alone orders the values
    save_png(figure, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
    with pytest.raises(OutputError, match="cannot be written"):
        save_png(figure, tmp_path / "none" / "map.png")


def test_lines_have_their_intervals_and_the_look_of_their_place() -> None:
    points = [Estimate(0.5, 0.4, 0.7, 9), Estimate(0.8, 0.75, 0.85, 9)]
    panels = [Panel("p", [Line("b", [8, 16], points), Line("future oracle", [8, 16], points, True)], points[0])]
    figure = line_panels(panels, ["a", "b"], "x", "y", log_x=True, y_limits=(0, 1))
    axes = figure.axes[0]
    bars = cast(ErrorbarContainer, axes.containers[0])
    line = bars.lines[0]
    assert np.asarray(line.get_ydata()).tolist() == [0.5, 0.8] and line.get_marker() == style(1)["marker"]
    intervals = bars.lines[2][0].get_segments()
    assert np.allclose([segment[:, 1] for segment in intervals], [[0.4, 0.7], [0.75, 0.85]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full", "b", "future oracle"]
    assert axes.get_ylim() == (0, 1) and [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "16"]


def test_every_figure_of_a_run_is_drawn_from_rows_alone() -> None:
    for kind, (arguments, make_rows) in KINDS.items():
        drawings = [part for part in parts(kind, arguments, make_rows(arguments)) if isinstance(part, Drawing)]
        assert drawings and all(drawing.caption.endswith(".") for drawing in drawings)


def test_markdown_has_the_pages_tables(folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    place = folder("ruler", 0.5)
    assert main(["bench", "report", str(place), "--markdown"]) == 0
    shown = capsys.readouterr().out
    arguments, rows = RULER, read_rows(place)
    tables = [part for part in parts("ruler", arguments, rows) if isinstance(part, Table)]
    blocks = [block for block in shown.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(tables) > 1 and " of " in shown.split("\n")[0]
    for table, block in zip(tables, blocks, strict=True):
        head, rule, *lines = block.strip().split("\n")
        assert f"**{table.caption}**" in shown
        assert [cell.strip() for cell in head.strip("|").split("|")] == list(table.columns)
        assert rule.count("|") == len(table.columns) + 1 and len(lines) == len(table.lines)
    assert not (place / "report.html").exists()


def test_json_has_the_manifest_and_the_tables(folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    place = folder("ruler", 0.5)
    assert main(["bench", "report", str(place), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = read_rows(place)
    tables = [part for part in parts("ruler", RULER, rows) if isinstance(part, Table)]
    assert [table["caption"] for table in shown["tables"]] == [table.caption for table in tables]
    assert [table["lines"] for table in shown["tables"]] == [[list(line) for line in table.lines] for table in tables]
    assert shown["manifest"] == read_manifest(place) and shown["done"] == len(rows) < shown["total"]

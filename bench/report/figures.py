"""Figures, drawn with matplotlib (extra `plot`), readable in print and without colour vision.

Lines differ in colour (Okabe & Ito's palette), marker and dash. Maps use cividis, whose brightness grows with the value,
and have the values written into their cells. Nothing here computes a result.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report.stats import Estimate
from modeling.environment import cannot_import
from restkv.errors import OutputError
from restkv.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osDv^P*X<>hpd8"
DASHES = ("-", "--", "-.", ":")
GREY = "#5f5f5f"
MOST_CELLS = 10_000  # of heat maps side by side


@dataclass(frozen=True)
class Line:
    """A named series of estimates; `bound` draws it in grey, as what methods are measured against."""

    label: str
    x: Sequence[float]
    y: Sequence[Estimate]
    bound: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: lines, and a level that all of them are compared with."""

    title: str
    lines: Sequence[Line]
    level: Estimate | None = None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches.

    Raises:
        OutputError: matplotlib is not installed, or cannot be imported.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise OutputError("figures need matplotlib; install it with: pip install 'restkv[plot]'") from None
    except Exception as error:  # MPLBACKEND is looked at
        raise OutputError(cannot_import("matplotlib", error)) from None
    rcParams["svg.hashsalt"] = "restkv"  # the same figure gives the same file
    rcParams["text.parse_math"] = False  # a method's name is no formula
    return Figure(figsize=(width, height), layout="constrained")


def need_matplotlib() -> None:
    """Refuse at once what could not be drawn in the end (raises OutputError)."""
    new_figure(1, 1)


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the index-th method; no two of 28 are alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def line_panels(
    panels: Sequence[Panel],
    order: Sequence[str],
    x_name: str,
    y_name: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Panels side by side, three in a row, with one legend; error bars are the intervals.

    Args:
        order: labels; a method's place in it decides how it is drawn, the same in all figures of a run.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.4 * columns + 1.9, 2.7 * rows + 0.4)
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        if panel.level is not None:
            handles["full"] = axes.axhline(panel.level.mean, color=GREY, linewidth=1, linestyle=(0, (6, 2)))
            axes.axhspan(panel.level.low, panel.level.high, color=GREY, alpha=0.15, linewidth=0)
        for line in sorted(panel.lines, key=lambda line: line.bound):
            handles[line.label] = _draw_line(axes, line, order, log_x)
        if log_x:
            axes.set_xscale("log", base=2)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif y_limits is not None:
            axes.set_ylim(*y_limits)
        ticks = sorted({x for line in panel.lines for x in line.x})
        ticks = ticks[:: math.ceil(len(ticks) / 12)]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(x_name, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#dddddd", linewidth=0.5)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(y_name, fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, handlelength=3.5)
    return figure


def _draw_line(axes: Axes, line: Line, order: Sequence[str], log_x: bool) -> Any:
    """Neighbouring methods are moved apart a little, so that their bars do not cover one another."""
    place = 0 if line.bound else order.index(line.label)
    nudge = 0.0 if line.bound else 0.012 * (place - (len(order) - 1) / 2)
    look = style(place)
    if line.bound:
        look = {"color": GREY, "marker": None, "linestyle": (0, (1, 1) if line.label.startswith("future") else (6, 2))}
    return axes.errorbar(
        [x * 2**nudge if log_x else x + nudge for x in line.x],
        [estimate.mean for estimate in line.y],
        yerr=np.clip([[e.mean - e.low for e in line.y], [e.high - e.mean for e in line.y]], 0, None),
        markersize=4,
        linewidth=1.2,
        elinewidth=0.7,
        capsize=2,
        **look,
    )


@dataclass(frozen=True)
class Grid:
    """A map of numbers: values[row][column], None where there is none yet."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]


def heat_maps(grids: Sequence[Grid], row_name: str, column_name: str, value_name: str) -> Figure:
    """Maps side by side, four in a row, of values from 0 to 1, which are written into the cells."""
    cells = sum(len(grid.rows) * len(grid.columns) for grid in grids)
    if cells > MOST_CELLS:
        raise OutputError(f"a map of {cells} cells cannot be drawn; give fewer lengths, depths or methods")
    columns = min(4, len(grids))
    rows = math.ceil(len(grids) / columns)
    wide = max(len(grid.columns) for grid in grids) * 0.5 + 0.5 + 0.06 * max(len(r) for g in grids for r in g.rows)
    tall = max(len(grid.rows) for grid in grids) * 0.3 + 0.9
    figure = new_figure(max(1.8, wide) * columns + 0.9, max(1.6, tall) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for place, (axes, grid) in enumerate(zip(panels.flat, grids, strict=False)):
        array = np.array(grid.values, dtype=float)  # None becomes nan
        image = axes.imshow(array, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(array):
            text = "·" if math.isnan(value) else f"{value:.2g}"
            colour = "white" if value <= 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_title(grid.title, fontsize=9)
        axes.set_xticks(range(len(grid.columns)), grid.columns, fontsize=7)
        axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
        if place % columns == 0:
            axes.set_ylabel(row_name, fontsize=8)
        axes.set_xlabel(column_name, fontsize=8)
    for axes in panels.flat[len(grids) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels.ravel().tolist(), label=value_name, shrink=0.9)
    return figure


@dataclass(frozen=True)
class Bars:
    """Bars beside one another: for every label one of each series; None where there is nothing to show."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


def bar_panels(panels: Sequence[Bars], value_name: str) -> Figure:
    """Lying bars, three panels in a row, each of its own scale, with the values written behind the bars.

    All panels have the same series; they differ in brightness and hatch.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(panel.labels) * len(panel.series) for panel in panels)
    figure = new_figure(3.6 * columns, (0.2 * most + 0.9) * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        height = 0.8 / len(panel.series)
        for index, (name, values) in enumerate(panel.series.items()):
            places = [place + index * height for place in range(len(panel.labels))]
            look = {"color": COLOURS[index + 1], "hatch": ("", "///")[index % 2], "edgecolor": "white"}
            bars = axes.barh(places, [value or 0.0 for value in values], height, **look)
            axes.bar_label(bars, ["" if value is None else f"{value:.3g}" for value in values], padding=2, fontsize=6)
            handles[name] = bars
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(panel.labels))], panel.labels, fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(value_name, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), fontsize=7)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure at 200 dots per inch."""
    with replaced(path) as file:
        figure.savefig(file, dpi=200, format="png", metadata={"Software": None})


def as_image(figure: Figure, description: str) -> str:
    """An <img> element that holds the figure as SVG: it needs no file, script or network."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description, quote=True)}">'

"""The panels of a figure as SVG for a page, with the points of their curves, which the page shows at the pointer.

matplotlib draws; the script of the page (`page.js`) only finds the nearest point. A charting library in one file weighs
50 kB (uPlot) to 3 MB (Plotly) and would need all figures a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from sleeptrain.report.style import COLORS, EDGE, FAINT, GRID, INK, STYLE, escape_texts, thin

UNITS = 72  # of an SVG, in an inch
PANEL_INCHES = 5.5  # width of a panel on the page
POINTS = 600  # of a curve at the pointer: more than a phone has pixels
MARGIN = 3.0  # around a panel, in units
DASHES = {"-": "", "--": "7 3", "-.": "7 2 2 2", ":": "2 2"}
# Colors of the figures and the variables of `page.css`, which differ between light and dark.
VARIABLES = {INK: "ink", GRID: "grid", EDGE: "edge", FAINT: "faint", "#000000": "guess", "#ffffff": "paper"}
VARIABLES |= {color: f"c{index}" for index, color in enumerate(COLORS)}


@dataclass(frozen=True)
class Key:
    """An entry of a legend. stroke: a color of CSS. dashes: of SVG, None for points without a line."""

    text: str
    stroke: str
    dashes: str | None


@dataclass(frozen=True)
class Panel:
    """A panel of a figure: axes, with the axes that share their place.

    svg: the element. width: in its units. keys: its own legend. data: what the script reads; each curve is
    [name, [x], [y], unit, box], and box is the place of the axes and their ranges,
    [left, top, right, bottom, x0, x1, y0, y1].
    """

    title: str
    svg: str
    width: float
    keys: list[Key]
    data: dict[str, Any]


def panels(figure: Figure) -> list[Panel]:
    """The panels in the order of the page. Changes the figure: save its PNG file first."""
    places: dict[tuple[float, ...], list[Axes]] = {}
    for axes in figure.axes:
        axes.set_gid(f"axes-{len(places)}-{figure.axes.index(axes)}")
        places.setdefault(tuple(axes.get_position(original=True).bounds), []).append(axes)
    texts = [(axes.get_title(loc="left"), axes.get_legend() is not None) for axes, *_ in places.values()]
    root = _drawn(figure, [axes for axes, *_ in places.values()])
    groups = {element.get("id"): element for element in root if element.get("id")}
    groups |= {element.get("id"): element for element in root.iter("g") if str(element.get("id")).startswith("axes-")}
    clips = {element.get("id"): element for element in root.iter("clipPath")}
    made = []
    for (title, has_keys), all_axes in zip(texts, places.values(), strict=True):
        view, parts = _view(figure, all_axes), [groups[axes.get_gid()] for axes in all_axes]
        svg = _svg(title, view, parts, clips)
        made.append(Panel(title, svg, view[2], keys(all_axes) if has_keys else [], _data(figure, all_axes)))
    return made


def keys(all_axes: Iterable[Axes]) -> list[Key]:
    """The legend of axes: each curve once, then the guessing lines."""
    found: dict[str, Key] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
            if isinstance(line, Line2D):
                has_line = line.get_linestyle() in DASHES
                dashes = DASHES[str(line.get_linestyle())] if has_line else None
                found.setdefault(label, Key(label, _color(matplotlib.colors.to_hex(line.get_color())), dashes))
    return sorted(found.values(), key=lambda key: key.stroke == _color("#000000"))


def _drawn(figure: Figure, titled: Sequence[Axes]) -> ElementTree.Element:
    """The figure as SVG without titles and legends, which the page has as text."""
    for axes in figure.axes:
        if (inside := axes.get_legend()) is not None:
            inside.set_visible(False)
    for axes in titled:
        axes.set_title("", loc="left")
        # By itself on a narrow screen, so it has the labels of axes that it shares.
        axes.set(xlabel=_label(axes, "x"), ylabel=_label(axes, "y"))
        axes.tick_params(labelbottom=True, labelleft=True)
    for outside in figure.legends:
        outside.remove()
    if len({axes.get_position(original=True).x0 for axes in titled}) == 1:
        figure.set_figwidth(PANEL_INCHES)
    # Each panel is cut out by itself, so they keep their places: a second layout would be a third of a report's time.
    figure.set_layout_engine("none")
    figure.set_dpi(UNITS)
    escape_texts(figure)
    file = BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "sleeptrain"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)
    return root


def _view(figure: Figure, all_axes: Sequence[Axes]) -> tuple[float, float, float, float]:
    """(left, top, width, height) of the axes with their labels, in units."""
    boxes = [box for axes in all_axes if (box := axes.get_tightbbox()) is not None]
    box, height = Bbox.union(boxes), figure.get_figheight() * UNITS
    x, y = box.x0 - MARGIN, height - box.y1 - MARGIN
    return round(x, 1), round(y, 1), round(box.width + 2 * MARGIN, 1), round(box.height + 2 * MARGIN, 1)


def _svg(
    title: str, view: Sequence[float], parts: Sequence[ElementTree.Element], clips: dict[Any, ElementTree.Element]
) -> str:
    svg = ElementTree.Element("svg", {"viewBox": " ".join(map(str, view)), "aria-hidden": "true"})
    defs = ElementTree.SubElement(svg, "defs")
    svg.extend(parts)
    used = {element.get("clip-path", "") for part in parts for element in part.iter()}
    defs.extend(clip for name, clip in clips.items() if f"url(#{name})" in used)
    targets = {element.get("href", "")[1:] for element in svg.iter("use")} | set(clips)
    for element in svg.iter():
        if element.get("id") not in targets:
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", _themed(element.attrib["style"]))
    return ElementTree.tostring(svg, encoding="unicode")


def _themed(style: str) -> str:
    """The style with the page's variables for colors."""
    for color, name in VARIABLES.items():
        style = style.replace(color, f"var(--{name})")
    return style


def _color(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color


def _data(figure: Figure, all_axes: Sequence[Axes]) -> dict[str, Any]:
    first, curves = all_axes[0], []
    names: dict[str, str] = {}
    for axes in all_axes:
        box = _box(figure, axes)
        for name, line in _named(axes):
            x, y = (np.asarray(values, float) for values in (line.get_xdata(), line.get_ydata()))
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = thin(x[finite], y[finite], POINTS)
            if len(x):
                curves.append([name, list(map(_short, x)), list(map(_short, y)), axes.get_ylabel(), box])
            if axes.fmt_xdata is not None:
                names |= {f"{_short(value)}": axes.format_xdata(value) for value in x.tolist()}
    return {"x": _label(first, "x"), "names": names, "curves": curves}


def _label(axes: Axes, direction: str) -> str:
    """The label of an axis, or that of the axes with which it is shared."""
    shared = axes.get_shared_x_axes() if direction == "x" else axes.get_shared_y_axes()
    every = [axes, *shared.get_siblings(axes)]
    labels = [other.get_xlabel() if direction == "x" else other.get_ylabel() for other in every]
    return next(filter(None, labels), "")


def _named(axes: Axes) -> list[tuple[str, Line2D]]:
    """The curves with a name: the gid of a line, else its label. Lines over the whole width have none here."""
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    named = [(str(bar.get_label()), bar.lines[0]) for bar in bars if bar.lines[0] is not None]
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    named += [(str(line.get_gid() or line.get_label()), line) for line in lines]
    return [(name, line) for name, line in named if not name.startswith("_")]


def _box(figure: Figure, axes: Axes) -> list[float]:
    width, height = figure.get_size_inches() * UNITS
    place = axes.get_position()
    corners = [place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height]
    return [*(round(float(c), 2) for c in corners), *map(float, axes.get_xlim()), *map(float, axes.get_ylim())]


def _short(value: float) -> float | int:
    """The value with seven digits: what a page shows of it and more."""
    if value == 0 or not math.isfinite(value):
        return 0
    rounded = float(f"{value:.7g}")
    return int(rounded) if rounded.is_integer() else rounded

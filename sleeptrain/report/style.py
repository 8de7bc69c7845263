"""The style that all figures of runs share."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from math import ceil
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter

from sleeptrain.terminal import printable

Numbers = npt.NDArray[Any]

INK, GRID, EDGE, FAINT = "#2b2b33", "#e4e4ea", "#9a9aa5", "#8a8a95"
TRAIN, SLEEP, AWAKE, WINDOW = "#5b5f97", "#1b6ca8", "#d1603d", "#6a994e"
# Colors of curves, in order. With more curves the colors repeat and the lines are dashed.
COLORS = ("#d1603d", "#e0a030", "#6a994e", "#1b6ca8", "#5b5f97", "#a23b72", "#7f7f7f", "#3aa6a0")
DASHES = ("-", "--", "-.", ":")

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names of runs and settings may have a $
}
# Of a legend: inches of a text line, of the gap after an entry, and of the margin; characters per inch of width.
LINE, GAP, AROUND, CHARACTERS = 0.155, 0.065, 0.3, 13
# Points of a curve: several per pixel of the width.
MOST_POINTS = 4000
SAMPLE = 8  # width of the line sample of an entry, in characters


def png(figure: Figure) -> bytes:
    """The figure as a PNG file. Control characters in its texts are escaped, as on the page."""
    escape_texts(figure)
    file = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def escape_texts(figure: Figure) -> None:
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))


def line_style(index: int) -> dict[str, Any]:
    """Color and dashes of curve number `index`."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def number(value: float) -> str:
    """A number of tokens, steps or FLOPs as an axis shows it: 1.2M, 3B."""
    return EngFormatter(sep="")(value).replace("G", "B")


def over(axes: Axes) -> None:
    """Label the x axis in thousands, millions and so on."""
    axes.xaxis.set_major_formatter(lambda x, _position: number(x))


def legend(figure: Figure, *panels: Axes) -> None:
    """Add a legend below all panels: each curve once, then the guessing lines. The figure grows by its height."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    order = sorted(handles, key=lambda label: _is_guess(handles[label]))
    width = int(CHARACTERS * figure.get_figwidth())
    labels = [wrapped(label, width - SAMPLE) for label in order]
    widest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, width // (widest + SAMPLE))
    length = ceil(len(labels) / columns)
    lines = max(sum(label.count("\n") + 1 for label in labels[start : start + length]) for start in range(len(labels)))
    figure.set_figheight(figure.get_figheight() + LINE * lines + GAP * length + AROUND)
    figure.legend([handles[label] for label in order], labels, loc="outside lower left", ncols=columns)


def _is_guess(handle: Any) -> bool:
    return isinstance(handle, Line2D) and handle.get_color() == "black"


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    return "\n".join(wrap(printable(text), width))


def say(axes: Axes, text: str) -> None:
    """Show a text instead of curves."""
    axes.text(0.5, 0.5, text, color=FAINT, ha="center", va="center", wrap=True, transform=axes.transAxes)


def thin(x: Numbers, y: Numbers, most: int = MOST_POINTS) -> tuple[Numbers, Numbers]:
    """The points of a curve that a figure can show: the lowest and the highest of each of many intervals.

    So no leap is lost. Curves of at most `most` points keep all of them. x, y: [n].
    """
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), most // 2 + 1).astype(int)
    intervals = list(pairwise(edges))
    indices = [first + int(find(y[first:end])) for first, end in intervals for find in (np.argmin, np.argmax)]
    index = np.unique(indices)
    return x[index], y[index]


def smooth(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """A curve of centred means over about a fortieth of the values. x, y: [n].

    Means near the ends are over fewer values, so that the curve never lags. Long curves keep evenly spaced points.
    """
    count = len(y)
    index = np.arange(count) if count <= MOST_POINTS else np.linspace(0, count - 1, MOST_POINTS).astype(int)
    reach = np.minimum(np.minimum(index, count - 1 - index), count // 80)
    sums = np.concatenate([[0.0], np.cumsum(y, dtype=np.longdouble)])
    return x[index], ((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)).astype(np.float64)

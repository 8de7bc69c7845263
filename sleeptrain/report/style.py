"""How all pictures of runs look."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK, GRID = "#2b2b33", "#e4e4ea"
TRAIN, SLEEP, AWAKE, WINDOW = "#5b5f97", "#1b6ca8", "#d1603d", "#6a994e"
# Of curves to compare, in order; with more curves colors repeat and lines are dashed.
COLORS = ("#d1603d", "#e0a030", "#6a994e", "#1b6ca8", "#5b5f97", "#a23b72", "#7f7f7f", "#3aa6a0")
DASHES = ("-", "--", "-.", ":")

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9a9aa5",
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
}


def png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    file = BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """Color and dashes of curve number `index`."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS) % len(DASHES)]}


def number(value: float) -> str:
    """1.2M, 3B: as numbers of tokens, steps and FLOPs are written beside an axis."""
    return EngFormatter(sep="")(value).replace("G", "B")


def over(axes: Axes) -> None:
    """The axis of x counts in thousands, millions and so on."""
    axes.xaxis.set_major_formatter(lambda x, _position: number(x))


def say(axes: Axes, text: str) -> None:
    """Words in the place of curves."""
    axes.text(0.5, 0.5, text, color="#8a8a95", ha="center", va="center", wrap=True, transform=axes.transAxes)


def smooth(values: list[float]) -> list[float]:
    """A centred mean over about a fortieth of the values, over fewer at the ends, so that it never lags behind."""
    last, widest = len(values) - 1, len(values) // 80
    means = []
    for at in range(len(values)):
        reach = min(widest, at, last - at)
        means.append(sum(values[at - reach : at + reach + 1]) / (2 * reach + 1))
    return means

"""The content of a figure: its curves and the names in its legend."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """(x, y) of each curve with a name."""
    found = {str(line.get_label()): line for line in axes.get_lines()}
    named = {label: line for label, line in found.items() if not label.startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in named.items()}  # type: ignore[arg-type]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]

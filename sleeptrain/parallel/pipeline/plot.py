"""A plot of a simulated step: ranks over time, each round in the colour of its window, paler with each pass."""

from __future__ import annotations

from collections import defaultdict

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sleeptrain.parallel.pipeline.schedule import Backward, Forward, HeadBackward, HeadForward
from sleeptrain.parallel.pipeline.simulate import Simulation

Colour = tuple[float, float, float]
HATCHES = {Forward: "", Backward: "////", HeadForward: "..", HeadBackward: "xx"}
LABELS = {"////": "backward", "..": "head", "xx": "backward of the head"}


def plot_schedule(simulation: Simulation) -> Figure:
    """Draw the timeline of a simulation: forwards have no hatch, idle time is white. The caller saves the figure."""
    num_ranks = len(simulation.busy)
    figure = Figure(figsize=(14, 1.6 + 0.5 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (rank, colour, hatch), bars in _bars(simulation).items():
        axes.broken_barh(bars, (rank - 0.4, 0.8), facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.3)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, simulation.finish or 1.0)
    axes.set_xlabel("simulated time")
    axes.set_title(f"bubble {simulation.bubble:.1%}, peak live rounds {max(simulation.peak_live_rounds)}")
    hatches = {HATCHES[type(span.task)] for span in simulation.spans}
    handles = [
        Patch(facecolor="white", edgecolor="black", hatch=hatch, label=label)
        for hatch, label in LABELS.items()
        if hatch in hatches
    ]
    handles += [Patch(facecolor=colour, label=label) for label, colour in _legend(simulation).items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    return figure


def _bars(simulation: Simulation) -> dict[tuple[int, Colour, str], list[tuple[float, float]]]:
    """The (start, duration) of the tasks, grouped by rank, colour and hatch."""
    bars: dict[tuple[int, Colour, str], list[tuple[float, float]]] = defaultdict(list)
    for span in simulation.spans:
        r = simulation.schedule.plans[span.task.micro_batch][span.task.round]
        hatch = HATCHES[type(span.task)]
        bars[span.rank, _colour(r.window, r.pass_index), hatch].append((span.start, span.end - span.start))
    return bars


def _legend(simulation: Simulation) -> dict[str, Colour]:
    """Label -> colour of the first 12 (window, pass) pairs, both counted from 1: more would not fit a legend."""
    rounds = {(r.window, r.pass_index) for rounds in simulation.schedule.plans for r in rounds}
    return {f"window {window + 1}, pass {n}": _colour(window, n) for window, n in sorted(rounds)[:12]}


def _colour(window: int, pass_index: int) -> Colour:
    hue = to_rgb(colormaps["tab10"](window % 10))
    depth = 0.75 ** (pass_index - 1)
    red, green, blue = (1 - depth * (1 - part) for part in hue)
    return red, green, blue

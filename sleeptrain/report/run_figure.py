"""The figure of one run, from its records.

Top: training loss over tokens. Middle: passes N and window L. Bottom left: the gain of sleep, as the held-out loss of
windows 2..K with and without sleep. Bottom right: the accuracy, or without one the loss of each window in the last
evaluation.
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sleeptrain.report.records import Records
from sleeptrain.report.style import AWAKE, INK, SLEEP, STYLE, TRAIN, WINDOW, Numbers, over, say, smooth, thin, wrapped
from sleeptrain.train.logging.metrics import Record, mean_later_windows


def gain(evaluation: Record) -> tuple[int, float | None, float | None]:
    """(largest N evaluated, mean loss of windows 2..K with it, the same with N=1). None: not evaluated."""
    losses = evaluation["eval"]["loss"]
    most = max(map(int, losses))
    awake = mean_later_windows(losses["1"]) if "1" in losses else None
    return most, mean_later_windows(losses[str(most)]) if most > 1 else None, awake


def draw_run(name: str, records: Records) -> Figure:
    """Draw a run with at least one training record. It may have no evaluation."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 10), layout="constrained")
        rows = figure.add_gridspec(3, 1, height_ratios=[3, 1.3, 2.6])
        bottom = rows[2].subgridspec(1, 2, width_ratios=[2.2, 1])
        top = figure.add_subplot(rows[0])
        middle = figure.add_subplot(rows[1], sharex=top)
        step, tokens = records.columns["step"][-1], records.column("tokens")
        title = f"{name}   {step:,} steps, {_tokens(tokens[-1])} tokens"
        figure.suptitle(wrapped(title, 100), fontsize=13)
        _fill(records, top, middle, figure.add_subplot(bottom[0], sharex=top), figure.add_subplot(bottom[1]))
    return figure


def draw_run_panels(records: Records) -> Figure:
    """The panels of `draw_run` in equal sizes, for a page that places them by its width."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8))  # without a layout: a page shows each panel by itself
        (loss, curriculum), (sleep, last) = figure.subplots(2, 2)
        _fill(records, loss, curriculum, sleep, last)
        for axes in (loss, curriculum):
            axes.set_xlabel("wake tokens seen")
    return figure


def _fill(records: Records, loss: Axes, curriculum: Axes, sleep: Axes, last: Axes) -> None:
    draw_loss(loss, records)
    draw_curriculum(curriculum, records)
    draw_gain(sleep, records.evaluations)
    if records.evaluations and "accuracy" in records.evaluations[-1]["eval"]:
        draw_accuracy(last, records.evaluations)
    else:
        draw_windows(last, records.evaluations)
    seen = [int(records.column("tokens").max()), *(record["tokens"] for record in records.evaluations)]
    for axes in (loss, curriculum, sleep):
        axes.set_xlim(0, 1.01 * max(seen))


def draw_loss(axes: Axes, records: Records) -> None:
    finite = records.finite
    tokens, losses = records.column("tokens")[finite], records.column("loss")[finite]
    thinned, marker = thin(tokens, losses), "." if len(losses) <= 30 else "-"
    axes.plot(*thinned, marker, color=TRAIN, alpha=0.4, linewidth=0.8, label="training, each record")
    axes.plot(*smooth(tokens, losses), color=TRAIN, linewidth=1.9, label="training, smoothed")
    points = [(r["tokens"], _mean(r["eval"]["loss"][str(gain(r)[0])])) for r in records.evaluations]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if known:
        axes.plot(*zip(*known, strict=True), "o", color=INK, markersize=4, label="held out, all windows")
    if skipped := records.num_steps - len(losses):
        axes.plot([], [], " ", label=f"{skipped} not finite, not drawn")
    x, y = (np.concatenate([drawn, [point[axis] for point in known]]) for axis, drawn in enumerate(thinned))
    _fit_height(axes, x, y, since=0.01)
    axes.set(title="Loss", ylabel="nats per token")
    over(axes)
    axes.legend(loc="upper right")


def draw_curriculum(axes: Axes, records: Records) -> None:
    """Draw N and L over tokens. A record holds those of the step that ends at its tokens (`where="pre"`)."""
    tokens = np.concatenate([[0], records.column("tokens")])
    passes, windows = (np.concatenate([values[:1], values]) for values in map(records.column, ("passes", "window")))
    axes.step(*thin(tokens, passes), where="pre", color=SLEEP, linewidth=1.8, gid="passes N")
    axes.set(title="Curriculum", ylim=(0, max(passes) * 1.25))
    axes.set_ylabel("passes N", color=SLEEP)
    _few_ticks(axes, passes)
    right = axes.twinx()
    right.step(*thin(tokens, windows), where="pre", color=WINDOW, linewidth=1.8, linestyle=(0, (5, 2)), gid="window L")
    right.set(ylim=(0, max(windows) * 1.5))
    right.set_ylabel("window L (tokens)", color=WINDOW)
    _few_ticks(right, windows)
    right.grid(False)
    over(axes)


def draw_gain(axes: Axes, evaluations: list[Record]) -> None:
    gains = [(r["tokens"], *gain(r)) for r in evaluations]
    awake = [(tokens, one) for tokens, _, _, one in gains if one is not None]
    asleep = [(tokens, many) for tokens, _, many, _ in gains if many is not None]
    both = [(tokens, many, one) for tokens, _, many, one in gains if many is not None and one is not None]
    axes.set(title="Held-out loss of windows 2..K", ylabel="nats per token")
    over(axes)
    axes.set_xlabel("wake tokens seen")
    if not awake and not asleep:
        say(axes, "not evaluated yet")
        return
    if both:
        axes.fill_between(*zip(*both, strict=True), color=SLEEP, alpha=0.12, linewidth=0)  # type: ignore[arg-type]
        _, many, one = both[-1]
        # As text, since the two curves may overlap.
        axes.text(0.02, 0.05, f"at the end {many - one:+.4f} nats with sleep", transform=axes.transAxes, color=INK)
    if awake:
        axes.plot(*zip(*awake, strict=True), "o-", color=AWAKE, markersize=3.5, label="without sleep (N=1)")
    if asleep:
        numbers = sorted({most for _, most, many, _ in gains if many is not None})
        passes = f"N={numbers[0]}" + (f"..{numbers[-1]}, as it grows" if len(numbers) > 1 else "")
        axes.plot(*zip(*asleep, strict=True), "o-", color=SLEEP, markersize=3.5, label=f"with sleep ({passes})")
    x, y = np.array([*awake, *asleep]).T
    _fit_height(axes, x, y, since=0.25)
    axes.legend(loc="upper right")


def draw_windows(axes: Axes, evaluations: list[Record]) -> None:
    axes.set(title="Each window, last evaluation", xlabel="window")
    if not evaluations:
        say(axes, "not evaluated yet")
        return
    losses = evaluations[-1]["eval"]["loss"]
    most = max(map(int, losses))
    for passes in sorted(map(int, losses)):
        values = [math.nan if value is None else value for value in losses[str(passes)]]
        color = AWAKE if passes == 1 else SLEEP
        alpha = 1.0 if passes in (1, most) else 0.45
        marker = "o-" if len(values) <= 32 else "-"
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, marker, color=color, alpha=alpha, markersize=3.5, label=f"N={passes}")
    axes.set_xlim(0.5, len(losses[str(most)]) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(loc="upper right")


def draw_accuracy(axes: Axes, evaluations: list[Record]) -> None:
    curves: dict[int, list[tuple[int, float]]] = {}
    for record in evaluations:
        for passes, accuracy in record["eval"].get("accuracy", {}).items():
            curves.setdefault(int(passes), []).append((record["tokens"], 100 * accuracy))
    for passes, points in sorted(curves.items()):
        color, alpha = (AWAKE, 1.0) if passes == 1 else (SLEEP, 1.0 if passes == max(curves) else 0.45)
        axes.plot(*zip(*points, strict=True), "o-", color=color, alpha=alpha, markersize=3.5, label=f"N={passes}")
    axes.set(title="Held-out accuracy (%)", ylim=(0, 103), xlim=(0, 1.03 * evaluations[-1]["tokens"]))
    over(axes)
    axes.set_xlabel("wake tokens seen")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(loc="best")


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


def _tokens(number: float) -> str:
    return EngFormatter(places=1, sep="")(number).replace("G", "B")


def _fit_height(axes: Axes, x: Numbers, y: Numbers, since: float) -> None:
    """Fit the y axis to the points after the share `since` of the run, since the first fall would flatten the rest."""
    later = y[(x >= since * x.max(initial=0)) & np.isfinite(y)]
    if len(later):
        margin = 0.08 * (later.max() - later.min()) or 0.1
        axes.set_ylim(later.min() - margin, later.max() + 2 * margin)


def _few_ticks(axes: Axes, values: Numbers) -> None:
    """Set ticks at the values themselves if they are few."""
    distinct = np.unique(values)
    if len(distinct) <= 4:
        axes.set_yticks(distinct)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))

"""Draws a run: `python tools/plot_run.py RUN_DIR [--out FILE.png]`, from the run's metrics.jsonl.

Top: training loss over tokens. Middle: passes N and window L. Bottom: what sleep is worth, the held-out loss of windows
2..K with sleep and without, beside the loss of each window in the last evaluation (the accuracy, where there is one).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.files import whole_file
from sleeptrain.train.metrics import Record, mean_later_windows, read_metrics

INK, GRID = "#2b2b33", "#e4e4ea"
TRAIN, SLEEP, AWAKE, WINDOW = "#5b5f97", "#1b6ca8", "#d1603d", "#6a994e"

STYLE = {
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a training run into one picture.")
    parser.add_argument("run_dir", type=Path, help="the run's folder, which holds metrics.jsonl")
    parser.add_argument("--out", type=Path, help="the picture (default: <run_dir>/report.png)")
    options = parser.parse_args(argv)
    try:
        steps, evaluations = read_run(options.run_dir)
        out = options.out or options.run_dir / "report.png"
        save(draw(options.run_dir.resolve().name, steps, evaluations), out)
    except UserError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    print(out)
    print(summary(steps, evaluations))
    return 0


def read_run(run_dir: Path) -> tuple[list[Record], list[Record]]:
    """The training and the evaluation records of a run. Raises DataError when there is nothing to draw."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{run_dir} holds no metrics.jsonl; give the folder of a run (<run.root>/<run.name>)")
    records = read_metrics(path)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise DataError(f"{path} holds no training record yet; the first comes after train.log_every steps")
    return steps, [record for record in records if "eval" in record]


def gain(evaluation: Record) -> tuple[int, float | None, float | None]:
    """The most passes evaluated, and the mean loss of windows 2..K with them and with one (None: not evaluated)."""
    losses = evaluation["eval"]["loss"]
    most = max(map(int, losses))
    awake = mean_later_windows(losses["1"]) if "1" in losses else None
    return most, mean_later_windows(losses[str(most)]) if most > 1 else None, awake


def summary(steps: list[Record], evaluations: list[Record]) -> str:
    """Three lines: last training loss, loss of windows 2..K with and without sleep, their difference."""
    most, asleep, awake = gain(evaluations[-1]) if evaluations else (1, None, None)
    last = steps[-1]
    lines = [f"loss {last['loss']:.4f} at step {last['step']}, {last['tokens']:,} tokens"]
    if asleep is None or awake is None:
        one = "" if awake is None else f" {awake:.4f}"
        return "\n".join([*lines, f"windows 2..K: N=1{one or ' not evaluated'}", "with sleep: not evaluated"])
    lines.append(f"windows 2..K: N={most} {asleep:.4f}, N=1 {awake:.4f}")
    relative = f" (relative {100 * (asleep - awake) / awake:+.2f}%)" if awake else ""
    lines.append(f"with sleep: {abs(awake - asleep):.4f} {'HIGHER' if asleep > awake else 'lower'}{relative}")
    return "\n".join(lines)


def draw(name: str, steps: list[Record], evaluations: list[Record]) -> Figure:
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure = plt.figure(figsize=(11, 10), layout="constrained")
        rows = figure.add_gridspec(3, 1, height_ratios=[3, 1.3, 2.6])
        bottom = rows[2].subgridspec(1, 2, width_ratios=[2.2, 1])
        top = figure.add_subplot(rows[0])
        middle = figure.add_subplot(rows[1], sharex=top)
        figure.suptitle(f"{name}   {steps[-1]['step']:,} steps, {_tokens(steps[-1]['tokens'])} tokens", fontsize=13)
        draw_loss(top, steps, evaluations)
        draw_curriculum(middle, steps)
        draw_gain(figure.add_subplot(bottom[0], sharex=top), evaluations)
        small = figure.add_subplot(bottom[1])
        if evaluations and "accuracy" in evaluations[-1]["eval"]:
            draw_accuracy(small, evaluations)
        else:
            draw_windows(small, evaluations)
        top.set_xlim(0, 1.01 * max(record["tokens"] for record in [*steps, *evaluations]))
    return figure


def draw_loss(axes: Axes, steps: list[Record], evaluations: list[Record]) -> None:
    finite = [record for record in steps if math.isfinite(record["loss"])]
    tokens, losses = [r["tokens"] for r in finite], [r["loss"] for r in finite]
    axes.plot(
        tokens,
        losses,
        "." if len(losses) <= 30 else "-",
        color=TRAIN,
        alpha=0.4,
        linewidth=0.8,
        label="training, each record",
    )
    axes.plot(tokens, smooth(losses), color=TRAIN, linewidth=1.9, label="training, smoothed")
    points = [(r["tokens"], _mean(r["eval"]["loss"][str(gain(r)[0])])) for r in evaluations]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if known:
        axes.plot(*zip(*known, strict=True), "o", color=INK, markersize=4, label="held out, all windows")
    if skipped := len(steps) - len(finite):
        axes.plot([], [], " ", label=f"{skipped} not finite, not drawn")
    _fit_height(axes, [*zip(tokens, losses, strict=True), *known], since=0.01)
    axes.set(title="Loss", ylabel="nats per token")
    _over_tokens(axes)
    axes.legend(loc="upper right")


def draw_curriculum(axes: Axes, steps: list[Record]) -> None:
    """A record tells of the step that ends at its tokens, hence steps that reach back."""
    tokens = [0, *(r["tokens"] for r in steps)]
    passes = [steps[0]["passes"], *(r["passes"] for r in steps)]
    windows = [steps[0]["window"], *(r["window"] for r in steps)]
    axes.step(tokens, passes, where="pre", color=SLEEP, linewidth=1.8)
    axes.set(title="Curriculum", ylim=(0, max(passes) * 1.25))
    axes.set_ylabel("passes N", color=SLEEP)
    _few_ticks(axes, passes)
    right = axes.twinx()
    right.step(tokens, windows, where="pre", color=WINDOW, linewidth=1.8, linestyle=(0, (5, 2)))
    right.set(ylim=(0, max(windows) * 1.5))
    right.set_ylabel("window L (tokens)", color=WINDOW)
    _few_ticks(right, windows)
    right.grid(False)
    _over_tokens(axes)


def draw_gain(axes: Axes, evaluations: list[Record]) -> None:
    gains = [(r["tokens"], *gain(r)) for r in evaluations]
    awake = [(tokens, one) for tokens, _, _, one in gains if one is not None]
    asleep = [(tokens, many) for tokens, _, many, _ in gains if many is not None]
    both = [(tokens, many, one) for tokens, _, many, one in gains if many is not None and one is not None]
    axes.set(title="Held-out loss of windows 2..K", ylabel="nats per token")
    _over_tokens(axes)
    axes.set_xlabel("wake tokens seen")
    if not awake and not asleep:
        _say(axes, "not evaluated yet")
        return
    if both:
        axes.fill_between(*zip(*both, strict=True), color=SLEEP, alpha=0.12, linewidth=0)  # type: ignore[arg-type]
        _, many, one = both[-1]
        # In words, for the two curves may lie on each other.
        axes.text(0.02, 0.05, f"at the end {many - one:+.4f} nats with sleep", transform=axes.transAxes, color=INK)
    if awake:
        axes.plot(*zip(*awake, strict=True), "o-", color=AWAKE, markersize=3.5, label="without sleep (N=1)")
    if asleep:
        numbers = sorted({most for _, most, many, _ in gains if many is not None})
        passes = f"N={numbers[0]}" + (f"..{numbers[-1]}, as it grows" if len(numbers) > 1 else "")
        axes.plot(*zip(*asleep, strict=True), "o-", color=SLEEP, markersize=3.5, label=f"with sleep ({passes})")
    _fit_height(axes, awake + asleep, since=0.25)
    axes.legend(loc="upper right")


def draw_windows(axes: Axes, evaluations: list[Record]) -> None:
    axes.set(title="Each window, last evaluation", xlabel="window")
    if not evaluations:
        _say(axes, "not evaluated yet")
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
    _over_tokens(axes)
    axes.set_xlabel("wake tokens seen")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(loc="best")


def smooth(values: list[float]) -> list[float]:
    """A centred mean over about a fortieth of the values, over fewer at the ends, so that it never lags behind."""
    last, widest = len(values) - 1, len(values) // 80
    means = []
    for at in range(len(values)):
        reach = min(widest, at, last - at)
        means.append(sum(values[at - reach : at + reach + 1]) / (2 * reach + 1))
    return means


def save(figure: Figure, path: Path) -> None:
    """Writes the picture whole or not at all. Raises ConfigError for another format or a folder that is not there."""
    if path.suffix != ".png":
        raise ConfigError(f"--out {path} is no PNG; give a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it first")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


def _tokens(number: float) -> str:
    return EngFormatter(places=1, sep="")(number).replace("G", "B")


def _fit_height(axes: Axes, points: list[tuple[float, float]], since: float) -> None:
    """Fits the height to the points after the share `since` of the run: the first fall would flatten all the rest."""
    begin = since * max((x for x, _ in points), default=0)
    later = [y for x, y in points if x >= begin and math.isfinite(y)]
    if later:
        margin = 0.08 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - margin, max(later) + 2 * margin)


def _few_ticks(axes: Axes, values: list[int]) -> None:
    """Ticks at the very values where they are few."""
    distinct = sorted(set(values))
    if len(distinct) <= 4:
        axes.set_yticks(distinct)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _over_tokens(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda x, _position: f"{EngFormatter(sep='')(x)}".replace("G", "B"))


def _say(axes: Axes, text: str) -> None:
    options: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, text, color="#8a8a95", **options)


if __name__ == "__main__":
    sys.exit(main())

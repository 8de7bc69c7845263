"""The figures that compare runs: for each group a thick mean curve, thin curves of its seeds, and a shaded spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.report.curves import (
    Band,
    Breakdown,
    Quantity,
    band,
    breakdowns,
    counted,
    curve,
    ends_early,
    guessing,
    quantities,
    span,
)
from sleeptrain.report.groups import Group, Section, seeds
from sleeptrain.report.norms_figure import draw_norms
from sleeptrain.report.run_figure import draw_run, draw_run_panels
from sleeptrain.report.runs import ReadRun
from sleeptrain.report.style import STYLE, legend, line_style, over, say, smooth
from sleeptrain.terminal import printable

GUESSES = {
    "chance": "chance",
    "sampled": "labels drawn as often as they occur",
    "majority": "always the likelier label",
    "majority_bits": "always the likelier label",
    "nodes_accuracy": "knows the nodes and no edge",
    "nodes_loss": "knows the nodes and no edge",
    "commonest": "always the commonest answer",
}
GUESS_DASHES = (":", "-.", "--", (0, (1, 4)))
AWAKE = ", kept awake (N=1)"
X_AXES = ("steps", "training FLOPs")


@dataclass(frozen=True)
class Drawn:
    """A figure of a page. name: of its file, without the suffix. on_page: drawn for the page, if not `figure` is."""

    name: str
    title: str
    figure: Figure
    on_page: Figure | None = None


def draw_section(section: Section) -> list[Drawn]:
    """All figures of a task's runs, without empty ones."""
    drawn = []
    if any(run.evaluations for run in section.runs):
        for quantity in quantities(section):
            drawn.append(Drawn(quantity.name, quantity.title, draw_quantity(section, quantity)))
            if section.difficulty is not None:
                title = f"{quantity.title} by {section.difficulty}"
                drawn.append(Drawn(f"{quantity.name}-by-difficulty", title, draw_facet_ends(section, quantity)))
        for breakdown in breakdowns(section):
            if breakdown.by != "window":
                drawn.append(Drawn(breakdown.name, breakdown.title, draw_breakdown(section, breakdown)))
            title = f"{breakdown.title}, last evaluation"
            drawn.append(Drawn(f"{breakdown.name}-end", title, draw_breakdown_ends(section, breakdown)))
    with_steps = [run for run in section.runs if run.records.num_steps]
    if with_steps:
        drawn.append(Drawn("training-loss", "Training loss", draw_training(section)))
    if any(run.records.norms for run in section.runs):
        drawn.append(Drawn("norms", "Size of features by pass, and of memory by layer", draw_norms(section)))
    if len(section.runs) == 1 and with_steps:
        [run] = with_steps
        drawn.append(Drawn("run", "The run", draw_run(run.config.run.name, run.records), draw_run_panels(run.records)))
    return drawn


def draw_quantity(section: Section, quantity: Quantity) -> Figure:
    """A row of panels for each difficulty: left over steps, right over training FLOPs."""
    awake = quantity.name == "loss" and section.source == "shards"
    rows = [(title, groups, quantity) for title, groups in section.facets]
    return _draw_rows(section, rows, awake)


def draw_breakdown(section: Section, breakdown: Breakdown) -> Figure:
    """As `draw_quantity`, with a row of panels for each key."""
    return _draw_rows(section, [(key, section.groups, breakdown.of(key)) for key in breakdown.keys], awake=False)


def draw_facet_ends(section: Section, quantity: Quantity) -> Figure:
    """The last value over difficulty: a curve for each label, and the guessing lines."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for label in section.labels:
            groups = sorted((g for g in section.groups if g.label == label), key=lambda g: g.difficulty)
            ends = [(g, b) for g in groups if (b := band(g, quantity)).steps]
            text, index = label + _at_steps(section, ends), section.colors[label]
            _ends(axes, [g.difficulty for g, _ in ends], [b for _, b in ends], quantity.share, text, index)
        by_difficulty = [(groups[0].difficulty, guessing(groups, quantity)) for _, groups in section.facets]
        for index, name in enumerate(dict.fromkeys(name for _, lines in by_difficulty for name in lines)):
            points = [(x, _percent(lines[name][0], quantity.share)) for x, lines in by_difficulty if name in lines]
            dashes = GUESS_DASHES[index % len(GUESS_DASHES)]
            axes.plot(*zip(*points, strict=True), color="black", linewidth=1, linestyle=dashes, label=_guess(name))
        axes.set(xlabel=section.difficulty, ylabel=_y_label(quantity))
        axes.set_xticks([groups[0].difficulty for _, groups in section.facets])
        legend(figure, axes)
    return figure


def draw_breakdown_ends(section: Section, breakdown: Breakdown) -> Figure:
    """The last value of each group over the keys of a breakdown. For text also each group's loss with one pass."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for group in section.groups:
            index = section.colors[group.label]
            for awake in (False, True) if breakdown.by == "window" and _slept(group) else (False,):
                bands = [(key, band(group, breakdown.of(key), awake)) for key in breakdown.keys]
                known = [(breakdown.keys.index(key), b) for key, b in bands if b.steps]
                label = group.name + (AWAKE if awake else "")
                label += _at_steps(section, [(group, b) for _, b in known])
                _ends(axes, [x for x, _ in known], [b for _, b in known], breakdown.share, label, index, awake)
        many = max(1, len(breakdown.keys) // 16)
        axes.set_xticks(range(0, len(breakdown.keys), many), [printable(key) for key in breakdown.keys[::many]])
        axes.set(xlabel=breakdown.by, ylabel=_y_label(breakdown))
        axes.fmt_xdata = lambda x: printable(breakdown.keys[round(x)])  # at the pointer
        legend(figure, axes)
    return figure


def draw_training(section: Section) -> Figure:
    """The smoothed training loss of every run over steps, in its group's color. A panel for each difficulty."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1 + 3.4 * len(section.facets)), layout="constrained")
        panels = figure.subplots(len(section.facets), squeeze=False)[:, 0]
        for (title, groups), axes in zip(section.facets, panels, strict=True):
            _training(axes, section, groups)
            axes.set(ylabel="nats a token, smoothed")
            axes.set_title(title)
        panels[-1].set_xlabel("steps")
        legend(figure, *panels)
    return figure


def _training(axes: Axes, section: Section, groups: list[Group]) -> None:
    later = []
    for group in groups:
        for run in group.runs:
            finite = run.records.finite
            steps, losses = smooth(run.records.column("step")[finite], run.records.column("loss")[finite])
            later += losses[len(losses) // 50 :].tolist()
            style = line_style(section.colors[group.label])
            [line] = axes.plot(steps, losses, linewidth=1.2, alpha=0.8, label=group.label, **style)
            if len(group.runs) > 1:
                line.set_gid(_one_seed(group, run))
    if later:
        margin = 0.08 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - margin, max(later) + margin)
    over(axes)


def _draw_rows(section: Section, rows: Sequence[tuple[str, list[Group], Quantity]], awake: bool) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1 + 3.4 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 2, squeeze=False, sharey=True)
        for (title, groups, quantity), pair in zip(rows, panels, strict=True):
            for axes, x_axis in zip(pair, X_AXES, strict=True):
                _panel(axes, section, groups, quantity, x_axis, awake)
                axes.set_title(title)
            pair[0].set_ylabel(_y_label(quantity))
        legend(figure, *panels.flat)
    return figure


def _panel(axes: Axes, section: Section, groups: list[Group], quantity: Quantity, x_axis: str, awake: bool) -> None:
    by_flops = x_axis != "steps"
    unknown = ""
    for group in groups:
        label = group.label
        index = section.colors[group.label]
        for one_pass in (False, True) if awake and _slept(group) else (False,):
            b = band(group, quantity, one_pass)
            if by_flops and b.flops is None:
                unknown = next((run.flops for run in group.runs if isinstance(run.flops, str)), unknown)
                continue
            text = label + (AWAKE if one_pass else "")
            _seeds(axes, group, quantity, by_flops, one_pass, index, None if b.steps else f"{text}: {b.no_end}")
            _mean(axes, b, by_flops, quantity.share, text, index, one_pass)
    values = guessing(groups, quantity)
    for index, (name, levels) in enumerate(values.items()):
        for level in levels:
            line = _guess(name) + (f" ({_percent(level, quantity.share):.3g})" if len(levels) > 1 else "")
            y, dashes = _percent(level, quantity.share), GUESS_DASHES[index % len(GUESS_DASHES)]
            axes.axhline(y, color="black", linewidth=1, linestyle=dashes, label=line)
    if unknown and not axes.get_lines():
        say(axes, f"FLOPs not known: {unknown}")
    axes.set_xlabel(x_axis)
    over(axes)
    if quantity.share:
        axes.set_ylim(0, 103)


def _seeds(
    axes: Axes, group: Group, quantity: Quantity, by_flops: bool, awake: bool, index: int, label: str | None
) -> None:
    """A thin curve for every run of a group of several. label: for the legend, if the group has no mean curve."""
    for run in group.runs if len(group.runs) > 1 else ():
        points = curve(run, quantity, awake)
        x = [run.flops_until(step) if by_flops else step for step in points]
        if x and None not in x:
            y = [_percent(value, quantity.share) for value in points.values()]
            [line] = axes.plot(x, y, linewidth=0.8, alpha=0.5, label=label, **line_style(index))  # type: ignore[arg-type]
            line.set_gid(_one_seed(group, run) + (AWAKE if awake else ""))


def _mean(axes: Axes, b: Band, by_flops: bool, share: bool, label: str, index: int, awake: bool) -> None:
    x = (b.flops or []) if by_flops else b.steps
    if not x:
        return
    mean, low, high = ([_percent(v, share) for v in values] for values in (b.mean, b.low, b.high))
    style = line_style(index) | ({"linestyle": ":"} if awake else {})
    marker = "o" if len(x) <= 30 else None
    axes.plot(x, mean, linewidth=2, marker=marker, markersize=3.5, label=label + _of_seeds([b]), **style)
    if b.runs > 1:
        axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])


def _ends(
    axes: Axes, x: Sequence[float], bands: Sequence[Band], share: bool, label: str, index: int, awake: bool = False
) -> None:
    """The last values of bands, with bars from minimum to maximum."""
    if not bands:
        return
    mean, low, high = (
        [_percent(values[-1], share) for values in series]
        for series in ([b.mean for b in bands], [b.low for b in bands], [b.high for b in bands])
    )
    reach = [[m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)]]
    style = line_style(index) | ({"linestyle": ":"} if awake else {})
    axes.errorbar(x, mean, yerr=reach, marker="o", markersize=4, capsize=3, label=label + _of_seeds(bands), **style)


def _one_seed(group: Group, run: ReadRun) -> str:
    """The name of the curve of one run, where it is shown at the pointer."""
    return f"{group.label}, seed {' and '.join(str(seed) for seed in dict.fromkeys(seeds(run)))}"


def _at_steps(section: Section, ends: Sequence[tuple[Group, Band]]) -> str:
    """`, at step 500`, or `, at steps 500 to 900`, if one of the bands ends early (`ends_early`); else empty."""
    if not any(ends_early(section, group, b) for group, b in ends):
        return ""
    steps = [b.end for _, b in ends if b.end is not None]
    return f", at step{'s' if len(set(steps)) > 1 else ''} {span(steps)}"


def _slept(group: Group) -> bool:
    """True if a run of the group was evaluated with more than one pass."""
    return any(len(record["eval"]["loss"]) > 1 for run in group.runs for record in run.evaluations)


def _guess(name: str) -> str:
    return GUESSES.get(name, name)


def _of_seeds(bands: Sequence[Band]) -> str:
    return f", mean of {text}" if (text := counted(bands)) else ""


def _percent(value: float, share: bool) -> float:
    return 100 * value if share else value


def _y_label(quantity: Quantity | Breakdown) -> str:
    return "%" if quantity.share else quantity.unit

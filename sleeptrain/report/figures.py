"""The pictures that compare runs: a curve for each group, its seeds thin, their mean thick, their spread shaded."""

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
    behind,
    breakdowns,
    counted,
    curve,
    guessing,
    quantities,
    span,
)
from sleeptrain.report.groups import Group, Section
from sleeptrain.report.norms_figure import draw_norms
from sleeptrain.report.run_figure import draw_run
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
X_AXES = ("steps", "training FLOPs")


@dataclass(frozen=True)
class Drawn:
    """name: of the file, without its end."""

    name: str
    title: str
    figure: Figure


def draw_section(section: Section) -> list[Drawn]:
    """All pictures of a task's runs; those that would be empty are left out."""
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
        drawn.append(Drawn("run", "The run", draw_run(run.config.run.name, run.records)))
    return drawn


def draw_quantity(section: Section, quantity: Quantity) -> Figure:
    """A row of panels for each difficulty; left against steps, right against training FLOPs."""
    awake = quantity.name == "loss" and section.source == "shards"
    rows = [(title, groups, quantity) for title, groups in section.facets]
    return _draw_rows(section, rows, awake)


def draw_breakdown(section: Section, breakdown: Breakdown) -> Figure:
    """As `draw_quantity`, a row of panels for each key."""
    return _draw_rows(section, [(key, section.groups, breakdown.of(key)) for key in breakdown.keys], awake=False)


def draw_facet_ends(section: Section, quantity: Quantity) -> Figure:
    """The last value against difficulty, a curve for each other setting, and what guessing reaches at each."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for label in section.labels:
            groups = sorted((g for g in section.groups if g.label == label), key=lambda g: g.difficulty)
            ends = [(g, found) for g in groups if (found := band(g, quantity)).steps]
            told, index = label + _at(section, ends), section.colors[label]
            _ends(axes, [g.difficulty for g, _ in ends], [b for _, b in ends], quantity.share, told, index)
        by_difficulty = [(groups[0].difficulty, guessing(groups, quantity)) for _, groups in section.facets]
        for index, name in enumerate(dict.fromkeys(name for _, found in by_difficulty for name in found)):
            points = [(x, _percent(found[name][0], quantity.share)) for x, found in by_difficulty if name in found]
            dashes = GUESS_DASHES[index % len(GUESS_DASHES)]
            axes.plot(*zip(*points, strict=True), color="black", linewidth=1, linestyle=dashes, label=_guess(name))
        axes.set(xlabel=section.difficulty, ylabel=_y_label(quantity))
        axes.set_xticks([groups[0].difficulty for _, groups in section.facets])
        legend(figure, axes)
    return figure


def draw_breakdown_ends(section: Section, breakdown: Breakdown) -> Figure:
    """The last value of each group against the keys of a breakdown; of text each group's loss with one pass too."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for group in section.groups:
            index = section.colors[group.label]
            for awake in (False, True) if breakdown.by == "window" and _slept(group) else (False,):
                found = [(key, band(group, breakdown.of(key), awake)) for key in breakdown.keys]
                known = [(breakdown.keys.index(key), one) for key, one in found if one.steps]
                label = group.name + (", kept awake (N=1)" if awake else "")
                label += _at(section, [(group, one) for _, one in known])
                _ends(axes, [x for x, _ in known], [one for _, one in known], breakdown.share, label, index, awake)
        many = max(1, len(breakdown.keys) // 16)
        axes.set_xticks(range(0, len(breakdown.keys), many), [printable(key) for key in breakdown.keys[::many]])
        axes.set(xlabel=breakdown.by, ylabel=_y_label(breakdown))
        legend(figure, axes)
    return figure


def draw_training(section: Section) -> Figure:
    """The training loss of every run over steps, smoothed, in the color of its group; a panel for each difficulty."""
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
            axes.plot(steps, losses, linewidth=1.2, alpha=0.8, label=group.label, **style)
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
            found = band(group, quantity, one_pass)
            if by_flops and found.flops is None:
                unknown = next((run.flops for run in group.runs if isinstance(run.flops, str)), unknown)
                continue
            told = label + (", kept awake (N=1)" if one_pass else "")
            _seeds(axes, group, quantity, by_flops, one_pass, index, None if found.steps else f"{told}: {found.no_end}")
            _mean(axes, found, by_flops, quantity.share, told, index, one_pass)
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
    """Every run as far as it is, thin, where there are several. label: where there is no mean that could have it."""
    for run in group.runs if len(group.runs) > 1 else ():
        found = curve(run, quantity, awake)
        x = [run.flops_until(step) if by_flops else step for step in found]
        if x and None not in x:
            y = [_percent(value, quantity.share) for value in found.values()]
            axes.plot(x, y, linewidth=0.8, alpha=0.5, label=label, **line_style(index))  # type: ignore[arg-type]


def _mean(axes: Axes, found: Band, by_flops: bool, share: bool, label: str, index: int, awake: bool) -> None:
    x = (found.flops or []) if by_flops else found.steps
    if not x:
        return
    mean, low, high = ([_percent(v, share) for v in values] for values in (found.mean, found.low, found.high))
    style = line_style(index) | ({"linestyle": ":"} if awake else {})
    marker = "o" if len(x) <= 30 else None
    axes.plot(x, mean, linewidth=2, marker=marker, markersize=3.5, label=label + _of_seeds([found]), **style)
    if found.runs > 1:
        axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])


def _ends(
    axes: Axes, x: Sequence[float], found: Sequence[Band], share: bool, label: str, index: int, awake: bool = False
) -> None:
    """The last values of some bands, with bars from the least to the most."""
    if not found:
        return
    mean, low, high = (
        [_percent(values[-1], share) for values in series]
        for series in ([b.mean for b in found], [b.low for b in found], [b.high for b in found])
    )
    reach = [[m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)]]
    style = line_style(index) | ({"linestyle": ":"} if awake else {})
    axes.errorbar(x, mean, yerr=reach, marker="o", markersize=4, capsize=3, label=label + _of_seeds(found), **style)


def _at(section: Section, ends: Sequence[tuple[Group, Band]]) -> str:
    """`, at step 500`, or the first to the last step, where some of these last values are of no group's last step."""
    if not any(behind(section, group, found) for group, found in ends):
        return ""
    steps = [found.end for _, found in ends if found.end is not None]
    return f", at step{'s' if len(set(steps)) > 1 else ''} {span(steps)}"


def _slept(group: Group) -> bool:
    """Whether some run of the group was evaluated with more passes than one."""
    return any(len(record["eval"]["loss"]) > 1 for run in group.runs for record in run.evaluations)


def _guess(name: str) -> str:
    return GUESSES.get(name, name)


def _of_seeds(found: Sequence[Band]) -> str:
    return f", mean of {told}" if (told := counted(found)) else ""


def _percent(value: float, share: bool) -> float:
    return 100 * value if share else value


def _y_label(what: Quantity | Breakdown) -> str:
    return "%" if what.share else what.unit

"""Group runs: a section for each task; in it a group for each set of settings; in it the runs, one for each seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import count
from typing import Any

from sleeptrain.config.changes import on_resume, without_places
from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import Config
from sleeptrain.report.runs import ReadRun

TITLES = {"rule110": "Rule 110", "depo": "Depo", "gsm_infinite": "GSM-Infinite", "shards": "Text"}
SEEDS = ("train.seed", "data.seed")
# Name, place and permissions of a run. Other settings of `run.` tell what the run has started from.
NOT_COMPARED = ("run.name", "run.root", "run.allow_changes", "run.allow_older")
SYMBOLS = {"sleep.passes": "N", "sleep.window": "L", "data.rule110.steps": "t"}
# The setting that gives the difficulty of a task. Runs that differ in it have separate panels.
DIFFICULTY = {"rule110": "data.rule110.steps"}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seeds and places.

    name: the settings in which this group differs from others, in short.
    difficulty: the value of the task's difficulty; None if all runs have the same.
    label: the name without the difficulty. Groups with equal labels are compared over difficulties.
    runs: sorted by seed.
    """

    name: str
    difficulty: Any
    label: str
    runs: list[ReadRun]

    @property
    def repeated(self) -> list[str]:
        """A message for each set of runs with the same seeds, such as a run and its copy."""
        folders: dict[tuple[int, int], list[str]] = {}
        for run in self.runs:
            folders.setdefault(seeds(run), []).append(str(run.folder))
        repeated = [paths for paths in folders.values() if len(paths) > 1]
        return [f"{', '.join(paths)} have the same seeds and count as one; the mean is over runs" for paths in repeated]


@dataclass(frozen=True)
class Section:
    """The runs of one task.

    source: the task's name, or `shards`.
    differing: the settings in which its runs differ, with those that do not affect the numbers.
    colors: {label: number of its color}. A label has the same color in all sections of a page.
    """

    source: str
    groups: list[Group]
    differing: list[str]
    colors: dict[str, int]

    @property
    def title(self) -> str:
        return TITLES[self.source]

    @property
    def runs(self) -> list[ReadRun]:
        return [run for group in self.groups for run in group.runs]

    @property
    def difficulty(self) -> str | None:
        """The symbol of the setting that splits the runs into panels; None if all runs have the same value."""
        return None if self.groups[0].difficulty is None else symbol(DIFFICULTY[self.source])

    @property
    def facets(self) -> list[tuple[str, list[Group]]]:
        """(title, groups) of each panel."""
        if self.difficulty is None:
            return [("", self.groups)]
        values = sorted({group.difficulty for group in self.groups})
        return [(f"{self.difficulty}={v}", [g for g in self.groups if g.difficulty == v]) for v in values]

    @property
    def labels(self) -> list[str]:
        """The distinct labels of the curves, in order."""
        return list(dict.fromkeys(group.label for group in self.groups))


def sections(runs: Sequence[ReadRun]) -> list[Section]:
    """A section for each task of the runs."""
    by_source = {source: [run for run in runs if run.config.data.source == source] for source in TITLES}
    parts = {source: _groups(source, of_source) for source, of_source in by_source.items() if of_source}
    colors = _colors([list(dict.fromkeys(group.label for group in groups)) for groups, _ in parts.values()])
    both = zip(parts.items(), colors, strict=True)
    return [Section(source, groups, differing, color_numbers) for (source, (groups, differing)), color_numbers in both]


def _colors(labels: Sequence[list[str]]) -> list[dict[str, int]]:
    """For each section, {label: number of its color}. Labels of several sections get the first numbers."""
    often = Counter(label for names in labels for label in names)
    shared = {label: number for number, label in enumerate(label for label, times in often.items() if times > 1)}
    result = []
    for names in labels:
        free = (number for number in count() if number not in {shared[label] for label in names if label in shared})
        result.append({label: shared[label] if label in shared else next(free) for label in names})
    return result


def differences(configs: Sequence[Config]) -> list[str]:
    """The settings in which configurations of one data source differ. Settings with a symbol come first."""
    values = [compared(config) for config in configs]
    names = [name for name in values[0] if any(other[name] != values[0][name] for other in values[1:])]
    return sorted(names, key=lambda name: list(SYMBOLS).index(name) if name in SYMBOLS else len(SYMBOLS))


def compared(config: Config) -> dict[str, Any]:
    """The settings that are compared between runs: without places of files, and without other data sources."""
    others = tuple(f"data.{source}." for source in TITLES if source != config.data.source)
    all_settings = settings(without_places(config))
    return {name: value for name, value in all_settings if name not in NOT_COMPARED and not name.startswith(others)}


def symbol(name: str) -> str:
    return SYMBOLS.get(name, name)


def seeds(run: ReadRun) -> tuple[int, int]:
    """(train.seed, data.seed). Runs of a group in which both are equal count as one seed."""
    return run.config.train.seed, run.config.data.seed


def non_defaults(item: Any) -> dict[str, Any]:
    """{field: value} of an item in a list of settings, such as a curriculum stage, without defaults."""
    default = type(item)()
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def value_text(value: Any) -> str:
    """A setting's value in short: a repeating list as `8 x [a, b]`, an item of a list without its defaults."""
    if isinstance(value, list):
        periods = (n for n in range(1, len(value) // 2 + 1) if value == value[:n] * (len(value) // n))
        period = next(periods, len(value))
        items = f"[{', '.join(map(value_text, value[:period]))}]"
        return items if period == len(value) else f"{len(value) // period} x {items}"
    if is_dataclass(value):
        return " ".join(f"{name}={value_text(v)}" for name, v in non_defaults(value).items()) or "default"
    return "none" if value is None else str(value)


def _groups(source: str, runs: Sequence[ReadRun]) -> tuple[list[Group], list[str]]:
    """(groups of one task, settings in which its runs differ)."""
    differing = differences([run.config for run in runs])
    # Settings of `run.` name the start of a run. They may change on resume, but they affect the numbers.
    named = [name for name in differing if name not in SEEDS and (name.startswith("run.") or on_resume(name) != "free")]
    difficulty = DIFFICULTY.get(source)
    if difficulty not in named:
        difficulty = None
    members: dict[tuple[str, ...], list[ReadRun]] = {}
    for values, run in sorted(
        ((compared(run.config), run) for run in runs), key=lambda pair: [_order(pair[0][name]) for name in named]
    ):
        members.setdefault(tuple(value_text(values[name]) for name in named), []).append(run)
    groups, implied = [], _implied(named, list(members), difficulty)
    for texts, group_runs in members.items():
        label_texts = {name: text for name, text in zip(named, texts, strict=True) if name not in implied}
        label = _label({name: text for name, text in label_texts.items() if name != difficulty}) or _only_label(runs[0])
        value = None if difficulty is None else compared(group_runs[0].config)[difficulty]
        group_runs.sort(key=seeds)
        groups.append(Group(_label(label_texts) or label, value, label, group_runs))
    return groups, differing


def _label(texts: dict[str, str]) -> str:
    return ", ".join(f"{symbol(name)}={text}" for name, text in texts.items())


def _implied(named: Sequence[str], members: Sequence[tuple[str, ...]], difficulty: str | None) -> list[str]:
    """The settings that are a function of the difficulty, such as its budget. No label needs them."""
    if difficulty is None:
        return []
    rows = [dict(zip(named, texts, strict=True)) for texts in members]
    number = len({row[difficulty] for row in rows})
    pairs = {name: {(row[difficulty], row[name]) for row in rows} for name in named if name not in SYMBOLS}
    return [name for name, values in pairs.items() if len(values) == number]


def _only_label(run: ReadRun) -> str:
    """The label of the only curve: its N."""
    sleep = run.config.sleep
    if sleep.curriculum:
        return "N by the curriculum"
    return f"N drawn from 1 to {sleep.passes}" if sleep.sample_passes else f"N={sleep.passes}"


def _order(value: Any) -> tuple[int, float, str]:
    """A sort key: numbers by size, then other values as text."""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))

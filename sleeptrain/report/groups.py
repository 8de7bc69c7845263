"""Which runs belong together: a section for each task, in it a group for each set of settings, in it the seeds."""

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
# What a run is called, where it lies and what it was allowed; all else of `run.` is what it has started from.
OWN = ("run.name", "run.root", "run.allow_changes", "run.allow_older")
SYMBOLS = {"sleep.passes": "N", "sleep.window": "L", "data.rule110.steps": "t"}
# Where the difficulty of a task is a setting, runs that differ in it have panels of their own.
DIFFICULTY = {"rule110": "data.rule110.steps"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds and places alone.

    name: the settings in which this group differs from others, in short. difficulty: the value of the task's
    difficulty, where runs differ in it. label: the name without it, equal for groups to be compared over difficulties.
    """

    name: str
    difficulty: Any
    label: str
    runs: list[ReadRun]

    @property
    def repeated(self) -> list[str]:
        """In words, the runs that have the same seeds, such as a run and its copy."""
        folders: dict[tuple[int, int], list[str]] = {}
        for run in self.runs:
            folders.setdefault(seeds(run), []).append(str(run.folder))
        alike = [found for found in folders.values() if len(found) > 1]
        return [f"{', '.join(found)} have the same seeds and count as one; the mean is over runs" for found in alike]


@dataclass(frozen=True)
class Section:
    """The runs of one task. told: settings that tell its runs apart, those that do not matter to the numbers too.

    colors: the number of each label's color; a label of several sections of a page has the same in all.
    """

    source: str
    groups: list[Group]
    told: list[str]
    colors: dict[str, int]

    @property
    def title(self) -> str:
        return TITLES[self.source]

    @property
    def runs(self) -> list[ReadRun]:
        return [run for group in self.groups for run in group.runs]

    @property
    def difficulty(self) -> str | None:
        """The symbol of the setting that panels are split by; None where all runs have the same."""
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
        """Of the curves, each once, in order."""
        return list(dict.fromkeys(group.label for group in self.groups))


def sections(runs: Sequence[ReadRun]) -> list[Section]:
    by_source = {source: [run for run in runs if run.config.data.source == source] for source in TITLES}
    parts = {source: _groups(source, found) for source, found in by_source.items() if found}
    colors = _colors([list(dict.fromkeys(group.label for group in groups)) for groups, _ in parts.values()])
    both = zip(parts.items(), colors, strict=True)
    return [Section(source, groups, told, own) for (source, (groups, told)), own in both]


def _colors(labels: Sequence[list[str]]) -> list[dict[str, int]]:
    """For the labels of each section the numbers of their colors: the first ones are of the labels of several."""
    often = Counter(label for own in labels for label in own)
    shared = {label: number for number, label in enumerate(label for label, times in often.items() if times > 1)}
    found = []
    for own in labels:
        free = (number for number in count() if number not in {shared[label] for label in own if label in shared})
        found.append({label: shared[label] if label in shared else next(free) for label in own})
    return found


def differences(configs: Sequence[Config]) -> list[str]:
    """The settings in which configurations of one data source differ; symbols of the method first."""
    values = [compared(config) for config in configs]
    found = [name for name in values[0] if any(other[name] != values[0][name] for other in values[1:])]
    return sorted(found, key=lambda name: list(SYMBOLS).index(name) if name in SYMBOLS else len(SYMBOLS))


def compared(config: Config) -> dict[str, Any]:
    """The settings that can tell a run from others: not where it and its data lie, nor those of other data sources."""
    others = tuple(f"data.{source}." for source in TITLES if source != config.data.source)
    found = settings(without_places(config))
    return {name: value for name, value in found if name not in OWN and not name.startswith(others)}


def symbol(name: str) -> str:
    return SYMBOLS.get(name, name)


def seeds(run: ReadRun) -> tuple[int, int]:
    """(train.seed, data.seed): runs of a group that differ in neither are one seed."""
    return run.config.train.seed, run.config.data.seed


def told(item: Any) -> dict[str, Any]:
    """What an item of a list of settings, such as a stage, says: the fields that do not have their default."""
    plain = type(item)()
    found = {field.name: getattr(item, field.name) for field in fields(item)}
    return {name: value for name, value in found.items() if value != getattr(plain, name)}


def value_text(value: Any) -> str:
    """A setting's value in short; a list that repeats itself as `8 x [a, b]`, what an item leaves open unsaid."""
    if isinstance(value, list):
        periods = (n for n in range(1, len(value) // 2 + 1) if value == value[:n] * (len(value) // n))
        period = next(periods, len(value))
        items = f"[{', '.join(map(value_text, value[:period]))}]"
        return items if period == len(value) else f"{len(value) // period} x {items}"
    if is_dataclass(value):
        return " ".join(f"{name}={value_text(own)}" for name, own in told(value).items()) or "default"
    return "none" if value is None else str(value)


def _groups(source: str, runs: Sequence[ReadRun]) -> tuple[list[Group], list[str]]:
    """The groups of one task, and the settings that tell its runs apart."""
    told = differences([run.config for run in runs])
    # What a run has started from is free to change only because it has had its effect.
    named = [name for name in told if name not in SEEDS and (name.startswith("run.") or on_resume(name) != "free")]
    difficulty = DIFFICULTY.get(source)
    if difficulty not in named:
        difficulty = None
    members: dict[tuple[str, ...], list[ReadRun]] = {}
    for values, run in sorted(
        ((compared(run.config), run) for run in runs), key=lambda pair: [_order(pair[0][name]) for name in named]
    ):
        members.setdefault(tuple(value_text(values[name]) for name in named), []).append(run)
    groups, implied = [], _implied(named, list(members), difficulty)
    for texts, found in members.items():
        own = {name: text for name, text in zip(named, texts, strict=True) if name not in implied}
        label = _label({name: text for name, text in own.items() if name != difficulty}) or _only_label(runs[0])
        value = None if difficulty is None else compared(found[0].config)[difficulty]
        found.sort(key=seeds)
        groups.append(Group(_label(own) or label, value, label, found))
    return groups, told


def _label(texts: dict[str, str]) -> str:
    return ", ".join(f"{symbol(name)}={text}" for name, text in texts.items())


def _implied(named: Sequence[str], members: Sequence[tuple[str, ...]], difficulty: str | None) -> list[str]:
    """The settings that follow from the difficulty, such as a budget for each, so that no label needs them."""
    if difficulty is None:
        return []
    rows = [dict(zip(named, texts, strict=True)) for texts in members]
    number = len({row[difficulty] for row in rows})
    pairs = {name: {(row[difficulty], row[name]) for row in rows} for name in named if name not in SYMBOLS}
    return [name for name, found in pairs.items() if len(found) == number]


def _only_label(run: ReadRun) -> str:
    """Of the one curve: its N."""
    sleep = run.config.sleep
    if sleep.curriculum:
        return "N by the curriculum"
    return f"N drawn from 1 to {sleep.passes}" if sleep.sample_passes else f"N={sleep.passes}"


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then all else as text."""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))

"""The search ranks what plans of the single layouts say."""

from __future__ import annotations

import gc
from collections.abc import Hashable
from dataclasses import replace
from functools import cache
from math import inf
from typing import Any

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.distributed.gpus import Gpu, find_gpu
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.plan import planner
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.recompute import SHARE
from sleeptrain.plan.report import to_json, worst_total
from sleeptrain.plan.search import Search, _Searcher, search
from sleeptrain.plan.search_report import search_to_json, search_to_text

SETTINGS = (
    "experiment=stdlib",
    "model.vocab_size=1000",
    "model.layers=[gated_deltanet,attention,gated_deltanet]",
    "data.batch=4",
    "data.sequence=512",
    "sleep.passes=2",
    "sleep.curriculum=[{tokens: 100000, passes: 3}]",
)
PROCESSES = 2


def small() -> tuple[str, Gpu]:
    """A GPU in which some layouts have no room."""
    return "H100", replace(find_gpu("H100")[1], memory=130e6)


def config(*more: str) -> Config:
    return compose([*SETTINGS, *more])


@cache
def named() -> Search:
    """The search at a named efficiency, for which nothing is recorded."""
    return search(config(), PROCESSES, small(), 0.4)


def forecast(settings: str) -> tuple[float, int] | None:
    """(hours, bytes) of a plan with these settings; None if it is refused or does not fit."""
    try:
        plan = make_plan(config(*settings.split()), PROCESSES, small(), None)
    except ConfigError:
        return None
    total = worst_total(plan)
    return (to_json(plan)["seconds"] / 3600, total) if total <= SHARE * small()[1].memory else None


def every_layout() -> list[str]:
    return [
        f"parallel.tensor={t} parallel.pipeline={p} parallel.zero={z} parallel.split_head={head} train.micro_batch={m} "
        f"sleep.recompute={mode}"
        for t, p, head in ((1, 1, "false"), (1, 2, "false"), (1, 2, "true"), (2, 1, "false"))
        for z in (0, 1, 2, 3)
        for m in (1, 2, 4)
        for mode in ("none", "selective", "block", "pass", "window", "auto")
    ]


@pytest.mark.slow
def test_nothing_is_faster_than_what_the_search_finds() -> None:
    """Every cut's fastest layout, by planning each layout on its own."""
    found = search(config(), PROCESSES, small(), None)
    fastest: dict[str, float] = {}
    for settings in every_layout():
        if (one := forecast(settings)) is not None:
            cut = " ".join(settings.split()[:3])
            fastest[cut] = min(fastest.get(cut, one[0]), one[0])
    shown = {" ".join(f.settings.split()[:3]): f.hours for f in found.best}
    assert shown == {cut: pytest.approx(fastest[cut]) for cut in shown}
    assert {min(f.hours for f in found.best)} == {pytest.approx(min(fastest.values()))}
    assert {round(h, 9) for h in fastest.values()} == {round(h, 9) for h in shown.values()}, "twins apart"


@pytest.mark.slow
def test_settings_can_be_pasted_into_a_plan() -> None:
    found = search(config(), PROCESSES, small(), None)
    assert found.too_large > 0 and found.forecast > 0
    assert [f.hours for f in found.best] == sorted(f.hours for f in found.best)
    for best in (found.best[0], found.best[-1]):
        hours, memory = forecast(best.settings) or (0, 0)
        assert (best.hours, best.memory) == (pytest.approx(hours), memory)
        assert best.compute + best.bubble + best.links <= 1


def test_what_is_passed_over_is_not_among_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, counts = named(), list[tuple[int, int]]()
    monkeypatch.setattr(_Searcher, "_to_beat", lambda self, layout: inf)
    every = search(config(), PROCESSES, small(), 0.4, lambda s: counts.append((s.waiting, s.layouts)))
    assert pruned.best == every.best and {f.config.parallel.split_head for f in every.best} >= {True}
    assert pruned.forecast < every.forecast and pruned.slower > every.slower == 0
    assert counts[0] == (every.layouts, every.layouts) and counts[-1][0] == 1


def test_each_schedule_is_made_once_though_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[tuple[Hashable, ...]]()

    def counted(plans: list[Any], stages: PipelineStages, costs: Costs) -> Schedule:
        made.append((stages, tuple(plans)))
        return schedule(plans, stages, costs)

    monkeypatch.setattr(planner, "schedule", counted)
    monkeypatch.setattr(planner, "SCHEDULES", 2)  # as many as stages of the curriculum
    search(config(), PROCESSES, small(), 0.4)
    assert len(made) == len(set(made)) > 2


def test_the_garbage_collector_is_paused() -> None:
    enabled = list[bool]()
    search(config(), PROCESSES, small(), 0.4, lambda _: enabled.append(gc.isenabled()))
    assert set(enabled) == {False} and gc.isenabled()


def test_a_shared_head_is_among_the_settings_of_a_pipeline() -> None:
    stages = {"parallel.pipeline=2" in f.settings: "parallel.split_head=" in f.settings for f in named().best}
    assert stages == {True: True, False: False}


def test_refusals_are_those_of_a_start_and_are_counted() -> None:
    found = named()
    assert found.refused["parallel.zero=n does not go with parallel.pipeline=n"] > 0
    text = search_to_text(found, PROCESSES, "H100")
    assert "parallel.zero=n does not go with parallel.pipeline=n" in text and "a hop of a collective" in text
    assert found.best[0].settings in text
    layouts = search_to_json(found, PROCESSES, "H100")["layouts"]
    assert [one["settings"] for one in layouts] == [f.settings.split() for f in found.best]


def test_what_limits_a_layout() -> None:
    best = named().best[0]
    parts = {"bubble": 0.0, "links": 0.0, "host_bound": False}
    assert replace(best, **parts).limit == "compute"
    assert replace(best, **parts | {"host_bound": True}).limit == "the host"
    assert replace(best, **parts | {"bubble": 0.3, "links": 0.25}).limit == "pipeline bubble"
    assert replace(best, **parts | {"bubble": 0.3, "links": 0.4}).limit == "communication"


def test_no_layout_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"a start on 7 processes allows no layout of this run: .*data\.batch"):
        search(config(), 7, small(), 0.4)

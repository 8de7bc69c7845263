"""Rates of a run, by a clock that the tests set."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.step import StepResult
from sleeptrain.train import pace as pace_module
from sleeptrain.train.pace import Pace, peak_memory_mb

CPU = torch.device("cpu")
RESULT = StepResult(loss=1.0, state=FastWeights(()), num_rounds=3, flops=500)


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    monkeypatch.setattr(pace_module, "peak_flops", lambda device: 1000.0)
    monkeypatch.setattr(pace_module, "peak_memory_mb", lambda device: 12.5)
    return clock


def test_rates_are_those_since_the_last_time(clock: Clock) -> None:
    pace = Pace(CPU)
    for _ in range(2):
        pace.count(40, RESULT)
    clock.now += 4
    assert pace.take(tokens_left=100) == {
        "tokens_per_second": 20.0,
        "passes_per_second": 1.5,
        "mfu": 0.25,
        "memory_mb": 12.5,
        "eta_seconds": 5.0,
    }
    pace.count(10, RESULT)
    clock.now += 1
    assert pace.take(tokens_left=-3)["tokens_per_second"] == 10.0


def test_time_before_a_restart_does_not_count(clock: Clock) -> None:
    pace = Pace(CPU)
    pace.count(1000, RESULT)
    clock.now += 50
    pace.restart()
    pace.count(10, RESULT)
    clock.now += 2
    assert pace.take(0)["tokens_per_second"] == 5.0


def test_the_end_is_not_in_the_past_and_unknown_without_steps(clock: Clock) -> None:
    pace = Pace(CPU)
    assert pace.take(100)["eta_seconds"] is None, "and no time has passed"
    pace.count(10, RESULT)
    clock.now += 1
    assert pace.take(-5)["eta_seconds"] == 0


def test_a_device_without_a_known_peak_has_no_utilisation(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "peak_flops", lambda device: None)
    pace = Pace(CPU)
    pace.count(10, RESULT)
    clock.now += 1
    assert pace.take(0)["mfu"] is None


def test_memory_is_in_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    assert peak_memory_mb(torch.device("cuda")) == 3.0
    usage = type("Usage", (), {"ru_maxrss": 2048})
    monkeypatch.setattr(pace_module.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(pace_module.sys, "platform", "linux")
    assert peak_memory_mb(CPU) == 2.0
    monkeypatch.setattr(pace_module.sys, "platform", "darwin")
    assert peak_memory_mb(CPU) == 2048 / 2**20

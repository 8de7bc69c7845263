"""A process that is slow by itself is named, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.distributed.world import World
from sleeptrain.health import speed
from sleeptrain.health.speed import Probe, compare_speeds, probe
from sleeptrain.train import trainer
from sleeptrain.train.run_state import Run
from tests.parallel.processes import run_ranks
from tests.parallel.test_train import layout, records, settings


def test_a_probe_times_both_kinds_of_work() -> None:
    found = probe(torch.device("cpu"))
    assert found.device > 0 and found.python > 0 and found.host


def test_slow_ranks_are_those_beyond_the_factor_in_either_kind() -> None:
    found = [Probe("a", 1.0, 1.0), Probe("b", 1.1, 1.0), Probe("c", 1.0, 1.6), Probe("d", 3.0, 0.9), Probe("e", 1.5, 1)]
    record = compare_speeds(found, 1.5)
    assert record == {
        "device_seconds": 1.1,
        "python_seconds": 1.0,
        "slow": {
            "rank2": {"host": "c", "device": 1.0 / 1.1, "python": 1.6},
            "rank3": {"host": "d", "device": 3.0 / 1.1, "python": 0.9},
        },
    }


def test_the_slower_of_two_ranks_is_named() -> None:
    assert list(compare_speeds([Probe("a", 2.0, 1.0), Probe("b", 1.0, 1.0)], 1.5)["slow"]) == ["rank0"]  # type: ignore[call-overload]


@pytest.mark.usefixtures("imported")
def test_a_slow_rank_is_reported_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, gather = tmp_path / "said", World.gather

    def slowed(self: World, value: Any) -> Any:
        if isinstance(value, Probe):
            value = Probe("node7" if self.rank == 1 else "node6", 4.0 if self.rank == 1 else 1.0, 1.0)
        return gather(self, value)

    def message(run: Run, text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n" if run.world.is_main else "")

    monkeypatch.setattr(World, "gather", slowed)
    monkeypatch.setattr(speed, "SIZE", {"cpu": 8})
    monkeypatch.setattr(Run, "message", message)
    config = compose(settings(tmp_path, *layout(1, 1, 1), "health.probe_every=2"))
    assert run_ranks(trainer.train, 2, config) == [0, 0]
    assert [line for line in log.read_text().splitlines() if "slow" in line] == [
        "step 2: rank 1 on node7 is slow: 4.0 times the median for matrix products, 1.0 times for a loop of Python"
    ]
    (record,) = [r for r in records(tmp_path) if "speed" in r]
    assert record["step"] == 2 and record["speed"]["slow"] == {"rank1": {"host": "node7", "device": 4.0, "python": 1.0}}

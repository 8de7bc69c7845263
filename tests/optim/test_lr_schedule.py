"""The learning rate schedule at its corners."""

import itertools
import math

import pytest

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.optim.lr_schedule import SCHEDULES, lr_scale

TOTAL = 1000


def test_wsd_corners() -> None:
    config = OptimConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.25, min_lr_ratio=0.1)
    at = {n: lr_scale(n, TOTAL, config) for n in (0, 50, 100, 101, 750, 875, 1000, 5000)}
    assert at[0] == 0.0
    assert at[50] == 0.5
    assert at[100] == at[101] == at[750] == 1.0
    assert at[875] == pytest.approx(0.55, abs=1e-12)
    assert at[1000] == at[5000] == 0.1


def test_cosine_corners() -> None:
    config = OptimConfig(schedule="cosine", warmup_fraction=0.2, min_lr_ratio=0.1)
    assert lr_scale(100, TOTAL, config) == 0.5
    assert lr_scale(200, TOTAL, config) == 1.0
    assert lr_scale(400, TOTAL, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, abs=1e-12)
    assert lr_scale(600, TOTAL, config) == pytest.approx(0.55, abs=1e-12)
    assert lr_scale(1000, TOTAL, config) == lr_scale(2000, TOTAL, config) == 0.1


def test_constant() -> None:
    config = OptimConfig(schedule="constant", warmup_fraction=0.5, min_lr_ratio=0.3)
    assert [lr_scale(n, TOTAL, config) for n in (0, 250, 500, 1000, 2000)] == [0.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert lr_scale(0, TOTAL, OptimConfig(schedule=schedule, warmup_fraction=0.0)) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_warmup_divides_by_nothing(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_fraction=1.0, decay_fraction=0.0)
    assert [lr_scale(n, TOTAL, config) for n in (0, 500, 1000, 1500)] == [0.0, 0.5, 1.0, 1.0]


def test_wsd_without_decay_stays() -> None:
    config = OptimConfig(warmup_fraction=0.0, decay_fraction=0.0)
    assert {lr_scale(n, TOTAL, config) for n in (0, 1, 999, 1000, 2000)} == {1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rises_then_never_rises_again_and_stays_in_range(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_fraction=0.13, decay_fraction=0.31, min_lr_ratio=0.05)
    scales = [lr_scale(n, TOTAL, config) for n in range(TOTAL + 20)]
    assert all(0.0 <= s <= 1.0 for s in scales)
    assert all(a < b for a, b in itertools.pairwise(scales[:131]))
    assert all(a >= b for a, b in itertools.pairwise(scales[130:]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("schedule", "linear"), ("warmup_fraction", 1.5), ("decay_fraction", -0.1), ("min_lr_ratio", 2.0)],
)
def test_bad_settings_are_named(setting: str, value: object) -> None:
    config = OptimConfig()
    setattr(config, setting, value)
    with pytest.raises(ConfigError, match=f"optim.{setting}"):
        lr_scale(0, TOTAL, config)


def test_overlapping_shares_and_empty_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="overlap"):
        lr_scale(0, TOTAL, OptimConfig(warmup_fraction=0.6, decay_fraction=0.5))
    assert lr_scale(0, TOTAL, OptimConfig(warmup_fraction=0.3, decay_fraction=0.7)) == 0.0
    with pytest.raises(ConfigError, match=r"train\.tokens"):
        lr_scale(0, 0, OptimConfig())

"""Spikes, and the detector's state after a restart."""

from __future__ import annotations

import json
import random

from sleeptrain.health.spikes import SpikeDetector

# Median 5, median deviation 2, hence a robust deviation of 2.9652.
NINE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def detector(losses: list[float], norms: list[float], factor: float = 2.0, window: int = 9) -> SpikeDetector:
    result = SpikeDetector(factor, window)
    result.begin([1, 2, 3])
    for loss, norm in zip(losses, norms, strict=True):
        result.observe(loss, norm)
    return result


def test_a_spike_is_beyond_the_factor_above_the_median() -> None:
    found = detector(NINE, NINE)
    edge = 5 + 2 * 2 * 1.4826
    assert found.spike(edge - 1e-9, 1.0) is None
    assert found.spike(edge + 1e-9, 1.0) == "loss 10.93 is 2.0 deviations above 5, the median of 9 steps"
    assert found.spike(1.0, 20.0) == "gradient norm 20 is 5.1 deviations above 5, the median of 9 steps"
    assert found.spike(-1e9, 0.0) is None, "what is far below is none"


def test_outliers_do_not_hide_others() -> None:
    """The first spike would raise a mean and a standard deviation."""
    assert detector([*NINE[:-1], 1e6], NINE).spike(50.0, 1.0)


def test_only_the_last_steps_of_this_stage_count() -> None:
    assert detector(NINE[:-1], NINE[:-1]).spike(1e9, 1.0) is None, "the window is not full"
    assert detector([1e3 + x for x in NINE] + NINE, NINE + NINE).spike(100.0, 1.0)
    found = detector(NINE, NINE)
    found.begin([1, 2, 3])
    assert found.spike(100.0, 1.0)
    found.begin([2, 2, 3])
    assert found.spike(100.0, 1.0) is None


def test_a_level_that_stays_is_no_spike_after_half_a_window() -> None:
    found, spikes = detector(NINE, NINE), 0
    while found.spike(100.0 + spikes, 1.0):
        found.observe(100.0 + spikes, 1.0)
        spikes += 1
    assert spikes == 5


def test_without_a_factor_and_with_a_constant_loss() -> None:
    assert detector(NINE, NINE, factor=0.0).spike(1e9, 1e9) is None
    assert not SpikeDetector(0.0, 8).watches
    constant = detector([2.0] * 9, [1.0] * 9)
    assert constant.spike(2.0, 1.0) is None
    assert constant.spike(2.5, 1.0) == "loss 2.5 is far above 2, the median of 9 steps"


def test_a_restored_detector_goes_on_to_the_bit() -> None:
    generator = random.Random(0)
    losses = [generator.random() for _ in range(40)]
    found = detector(losses[:20], losses[20:])
    other = SpikeDetector(2.0, 9)
    other.load_state_dict(json.loads(json.dumps(found.state_dict())))
    other.begin([1, 2, 3])
    assert other.state_dict() == found.state_dict()
    assert other.spike(9.0, 9.0) == found.spike(9.0, 9.0)

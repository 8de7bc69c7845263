"""How often a run goes back, and to which step."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import HealthConfig
from sleeptrain.health.rollbacks import Rollbacks, reach


def test_rollbacks_count_until_the_run_is_past_the_bad_step() -> None:
    known = Rollbacks()
    known.taken_back(bad_step=14, to_step=6)
    assert (known.total, known.undone, known.in_vain) == (1, 7, 1)
    known.made(12)
    known.taken_back(13, 6)
    known.made(14)
    assert (known.total, known.undone, known.in_vain, known.furthest) == (2, 13, 2, 14)
    known.made(15)
    assert known.in_vain == 0


@pytest.mark.parametrize(
    ("base", "bad", "expected"),
    [(0, 14, 6), (0, 3, 0), (6, 9, 6), (6, 20, 12)],
)
def test_a_checkpoint_shortly_before_a_bad_step_does_not_count_as_good(base: int, bad: int, expected: int) -> None:
    assert Rollbacks(base=base).good_until(bad, distance=8) == expected


@pytest.mark.parametrize(
    ("on_nonfinite", "on_spike", "expected"),
    [("stop", "off", 0), ("skip", "stop", 0), ("rollback", "off", 64), ("stop", "rollback", 64)],
)
def test_checkpoints_stay_where_a_run_may_go_back(on_nonfinite: str, on_spike: str, expected: int) -> None:
    assert reach(HealthConfig(on_nonfinite=on_nonfinite, on_spike=on_spike, spike_window=64)) == expected

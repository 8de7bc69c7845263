"""How often a run goes back, and to which step."""

from __future__ import annotations

import pytest

from sleeptrain.health.rollbacks import Rollbacks


def test_rollbacks_count_until_the_step_that_went_wrong_is_passed() -> None:
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
    ("base", "bad", "wanted"),
    [(0, 14, 6), (0, 3, 0), (6, 9, 6), (6, 20, 12)],
)
def test_a_checkpoint_close_before_is_not_taken_for_good(base: int, bad: int, wanted: int) -> None:
    assert Rollbacks(base=base).good_until(bad, distance=8) == wanted

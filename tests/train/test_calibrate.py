from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sleeptrain.data.batch import IGNORE
from sleeptrain.train.calibrate import Calibration, Curves, Point, _hindsight, calibrate
from sleeptrain.train.calibration_rows import Halves, halves
from tests.models import random_batch, tiny_model
from tests.sleep.test_step import config
from tests.train.test_evaluate import batches

PASSES = 3


def test_thresholds_lie_between_one_and_all_passes() -> None:
    model = tiny_model()
    settings, rules = config(sleep__passes=PASSES, sleep__window=4), ["change", "acceleration"]
    found = calibrate(model, halves({"text": batches()}), settings, None, rules, 5)
    assert found.quantity == "loss" and found.rows == {"calibration": 2, "judged": 1}
    for curves in (found.calibrated, found.judged):
        assert [p.passes for p in curves.fixed] == [1, 2, 3]
        assert curves.rules.keys() == {"change", "acceleration"}
        for rule, points in curves.rules.items():
            thresholds = [p.setting for p in points]
            assert thresholds == sorted(set(thresholds)) == [p.setting for p in found.calibrated.rules[rule]]
            assert all(a.passes >= b.passes for a, b in pairwise(points)), "higher stops earlier"
    # The largest score of `change` is that of a wake pass: at this threshold no row sleeps.
    assert found.calibrated.rules["change"][-1].passes == 1
    assert found.calibrated.rules["change"][-1].value == pytest.approx(found.calibrated.fixed[0].value)


def test_judged_rows_have_no_say_in_the_thresholds() -> None:
    """Other judged rows leave all that chooses a threshold as it is, to the bit."""
    settings = config(sleep__passes=2, sleep__window=4)
    rows = halves({"text": batches()})
    others = {"text": [random_batch([[0] * 11, [0] * 5 + [2] * 6], seed=9)]}
    found, again = (
        calibrate(tiny_model(), r, settings, None, ["change"], 2) for r in (rows, Halves(rows.calibration, others))
    )
    assert found.calibrated == again.calibrated and found.judged != again.judged
    for one, other in zip(found.choices("change", 1.5), again.choices("change", 1.5), strict=True):
        assert (one.threshold, one.calibrated) == (other.threshold, other.calibrated)
        assert one.judged == next(p for p in found.judged.rules["change"] if p.setting == one.threshold)


def test_hindsight_takes_the_passes_that_suit_each_row() -> None:
    right_NB = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    points = _hindsight(right_NB, 4, is_loss=False)
    assert [(p.passes, p.value) for p in points] == [(1.0, 0.25), (1.25, 0.5), (1.75, 0.75)]
    [only] = _hindsight(np.ones((3, 4)), 4, is_loss=False)
    assert (only.passes, only.value) == (1.0, 1.0)
    losses = _hindsight(-np.array([[2.0, 4.0], [1.0, 4.0]]), 10, is_loss=True)
    assert [(p.passes, p.value) for p in losses] == [(1.0, 0.6), (1.5, 0.5)]


@pytest.mark.parametrize("sign", [1, -1], ids=["accuracy", "loss"])
def test_thresholds_are_chosen_by_the_calibration_rows_and_judged_by_the_others(sign: int) -> None:
    def points(*values: float) -> list[Point]:
        passes, thresholds = (4.0, 3.0, 2.5, 2.0), (0.1, 0.2, 0.3, 0.4)
        return [Point(p, sign * v, t) for p, v, t in zip(passes, values, thresholds, strict=True)]

    fixed = [Point(1.0, sign * 0.5, 1.0), Point(4.0, sign * 0.9, 4.0)]
    calibrated = Curves(fixed, {"change": points(0.9, 0.91, 0.91, 0.897)})
    judged = Curves(fixed, {"change": points(0.9, 0.8, 0.7, 0.95)})
    found = Calibration("accuracy" if sign == 1 else "loss", {}, calibrated, judged, [])
    best, cheapest = found.choices("change", 3.0)
    assert best.threshold == 0.3, "equal results by fewer passes"
    assert best.judged == judged.rules["change"][2] and best.share == 0.5
    assert cheapest.threshold == 0.4 and cheapest.judged.value == sign * 0.95
    [only] = found.choices("change", 1.9)
    assert only == cheapest, "no threshold keeps to 1.9 passes"


def test_rows_without_a_target_do_not_count() -> None:
    batch = random_batch([[0] * 8, [0] * 8])
    batch.targets_BT[1] = IGNORE
    rows = {"text": [batch]}
    found = calibrate(tiny_model(), Halves(rows, rows), config(sleep__passes=2, sleep__window=4), None, ["change"])
    assert found.hindsight[0].value == pytest.approx(min(p.value for p in found.judged.fixed[:1]))

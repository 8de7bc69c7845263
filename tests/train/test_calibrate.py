from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sleeptrain.data.batch import IGNORE
from sleeptrain.train.calibrate import Calibration, Point, _hindsight, calibrate
from tests.models import random_batch, tiny_model
from tests.sleep.test_step import config
from tests.train.test_evaluate import batches

PASSES = 3


def test_thresholds_lie_between_one_and_all_passes() -> None:
    model = tiny_model()
    settings, rules = config(sleep__passes=PASSES, sleep__window=4), ["change", "acceleration"]
    found = calibrate(model, lambda: {"text": batches()}, settings, None, rules)
    assert found.quantity == "loss" and [p.passes for p in found.fixed] == [1, 2, 3]
    assert found.rules.keys() == {"change", "acceleration"}
    for points in found.rules.values():
        thresholds = [p.setting for p in points]
        assert thresholds == sorted(set(thresholds))
        assert all(a.passes >= b.passes for a, b in pairwise(points)), "higher stops earlier"
    # The largest score of `change` is that of a wake pass: at this threshold no row sleeps.
    assert found.rules["change"][-1].passes == 1
    assert found.rules["change"][-1].value == pytest.approx(found.fixed[0].value)


def test_hindsight_takes_the_passes_that_suit_each_row() -> None:
    right_NB = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    points = _hindsight(right_NB, 4, is_loss=False)
    assert [(p.passes, p.value) for p in points] == [(1.0, 0.25), (1.25, 0.5), (1.75, 0.75)]
    [only] = _hindsight(np.ones((3, 4)), 4, is_loss=False)
    assert (only.passes, only.value) == (1.0, 1.0)
    losses = _hindsight(-np.array([[2.0, 4.0], [1.0, 4.0]]), 10, is_loss=True)
    assert [(p.passes, p.value) for p in losses] == [(1.0, 0.6), (1.5, 0.5)]


def test_the_best_threshold_within_a_budget() -> None:
    points = [Point(3.0, 0.9, 0.1), Point(2.5, 0.9, 0.2), Point(2.0, 0.8, 0.3)]
    found = Calibration("accuracy", [], {"change": points}, [])
    assert found.best("change", 3.0) == points[1], "equal accuracy by fewer passes"
    assert found.best("change", 2.2) == points[2]
    assert found.best("change", 1.9) is None


def test_rows_without_a_target_do_not_count() -> None:
    batch = random_batch([[0] * 8, [0] * 8])
    batch.targets_BT[1] = IGNORE
    found = calibrate(
        tiny_model(), lambda: {"text": [batch]}, config(sleep__passes=2, sleep__window=4), None, ["change"]
    )
    assert found.hindsight[0].value == pytest.approx(min(p.value for p in found.fixed[:1]))

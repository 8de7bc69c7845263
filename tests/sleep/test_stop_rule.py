from __future__ import annotations

import pytest
import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.sleep.stop_rule import Passed, StopRule, pooled, state_change, step_difference, stop_rule


def memory(*values: float) -> Recurrent:
    """S of rows with one number each."""
    return Recurrent(torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1))


def test_the_change_of_s_is_the_mean_over_recurrent_layers_of_the_core() -> None:
    before = FastWeights((memory(9.0, 9.0), memory(1.0, 0.0), None, None))
    after = FastWeights((memory(0.0, 0.0), memory(2.0, 0.0), memory(-4.0, 3.0), None))
    # Layer 1: (2 - 1) / 2 and, where S stays empty, 0. Layer 2 had no memory before: 1.
    assert state_change(before, after, (1, 4)).tolist() == [0.75, 0.5]


def test_steps_are_compared_by_their_size() -> None:
    last = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]])
    step = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 0.0]]])
    assert step_difference(last, step).tolist() == [0.0, 1.0, 0.0]


def test_a_rule_stops_at_its_threshold_from_min_passes_on() -> None:
    rule = StopRule("change", 0.5, 2, (0, 1))
    scores = torch.tensor([0.5, 0.6, torch.nan, torch.inf])
    assert rule.stops(scores, 1).tolist() == [False] * 4
    assert rule.stops(scores, 2).tolist() == [True, False, False, False], "no number, no stop"


def test_acceleration_has_no_score_after_the_wake_pass() -> None:
    step = torch.ones(2, 3, 4)
    passed = Passed(1, step, step.mean(1), FastWeights(()), FastWeights(()))
    assert StopRule("acceleration", 0.5, 1, (0, 1)).scores(passed, None, 4).tolist() == [torch.inf] * 2


def test_the_mean_of_features_leaves_pads_out() -> None:
    x_RLD = torch.tensor([[[1.0], [5.0]], [[2.0], [4.0]], [[7.0], [7.0]]])
    valid_RL = torch.tensor([[False, True], [True, True], [False, False]])
    assert pooled(x_RLD, valid_RL).flatten().tolist() == [5.0, 3.0, 0.0]
    assert pooled(x_RLD, None).flatten().tolist() == [3.0, 3.0, 7.0]


@pytest.mark.parametrize("kind", ["change", "gate"])
def test_settings_make_a_rule(kind: str) -> None:
    assert stop_rule(SleepConfig(), (0, 2)) is None
    sleep = SleepConfig(passes=4, stop=kind, stop_threshold=0.1, stop_gate="g", min_passes=2)
    assert stop_rule(sleep, (0, 2)) == StopRule(kind, 0.1, 2, (0, 2), "g")

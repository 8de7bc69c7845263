"""Which stages a round visits, and whose features it reads."""

from __future__ import annotations

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.stages import PipelineStages, feature_sources
from sleeptrain.sleep.rounds import WindowFacts, plan_rounds
from tests.parallel.pipeline.cases import plan

A, G = "attention", "gated_deltanet"
# Two layers on each of four stages; prelude on stage 0, core on 0 to 2, coda on 2 and 3.
PARTIAL = PipelineStages((0, 2, 4, 6, 8), (A, G, G, G, A, G, G, A), (1, 5))


def visits(stages, rounds):
    return [list(stages.visited(r)) for r in rounds]


def test_a_loss_visits_all_stages_a_sleep_pass_the_core_and_the_last_pass_those_up_to_the_last_state():
    assert visits(PARTIAL, plan(2, 3)) == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [PARTIAL.layers_on(plan(2, 3)[2], s) for s in range(4)] == [1, 2, 2, 1]


def test_a_silent_wake_round_ends_with_the_core():
    rounds = plan_rounds([WindowFacts(0, 4, (False,), (True,)), WindowFacts(4, 8, (True,), (False,))], 2, "unlabelled")
    assert visits(PARTIAL, rounds) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_state_only_round_of_attention_alone_visits_nothing():
    stages = PipelineStages((0, 1, 2), (A, A), (0, 2))
    assert visits(stages, plan(2, 2)) == [[0, 1], [], [0, 1]]
    assert stages.ring_width([plan(2, 2)]) == 1


def test_ring_width():
    assert PARTIAL.ring_width([plan(2, 2)]) == 3
    assert PARTIAL.ring_width([plan(2, 2, "none")]) == 1
    assert PARTIAL.ring_width([plan(2, 1)]) == 1


def test_a_first_sleep_pass_reads_both_wake_rounds_where_their_rows_take_part():
    facts = [WindowFacts(0, 4, (True, False, True), (True, True, False)), WindowFacts(4, 8, (True,) * 3, (False,) * 3)]
    rounds = plan_rounds(facts, 3)
    assert [r.pass_index for r in rounds] == [1, 1, 2, 3, 1]
    assert feature_sources(rounds) == [(), (), (0, 1), (2,), ()]
    only_silent = plan_rounds([WindowFacts(0, 4, (True, False), (False, True))], 2)
    assert feature_sources(only_silent) == [(), (), (1,)]


def test_a_sleep_pass_reads_its_own_window_alone():
    facts = [WindowFacts(0, 4, (True,), (False,)), WindowFacts(4, 8, (True,), (True,))]
    assert feature_sources(plan_rounds(facts, 3)) == [(), (), (1,), (2,)]


def test_without_feedback_no_features_come_back():
    assert feature_sources(plan(2, 3, "none")) == [()] * 4


@pytest.mark.parametrize("bounds", [(0,), (0, 1), (1, 2), (0, 0, 2), (0, 2, 1, 2), (0, 3)])
def test_bounds_that_are_no_stages_are_refused(bounds):
    with pytest.raises(ConfigError, match="pipeline stages"):
        PipelineStages(bounds, (A, G), (0, 2))


@pytest.mark.parametrize("core", [(0, 0), (1, 3), (-1, 2)])
def test_a_core_outside_the_layers_is_refused(core):
    with pytest.raises(ConfigError, match=r"sleep\.core"):
        PipelineStages((0, 2), (A, G), core)

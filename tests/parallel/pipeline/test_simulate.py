"""The simulator on lists written by hand: its times, its counts, and the lists that it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Backward, Forward, Receive, Schedule, Send, schedule
from sleeptrain.parallel.pipeline.simulate import ScheduleError, simulate
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.rounds import WindowFacts, plan_rounds
from tests.parallel.pipeline.cases import LENGTH, even_stages, plan

UNIT = Costs(forward=1 / LENGTH, backward=3 / LENGTH)  # a round on a stage of one layer takes 1 forward, 3 backward
F, G = Message(Kind.FEATURES, 0, 0, 0), Message(Kind.GRADIENT, 0, 0, 0)
PLANS = (tuple(plan(1, 1)),)


def by_hand(*ranks, num_sequences=1) -> Schedule:
    return Schedule(PLANS * num_sequences, even_stages(2, each=1), ranks)


ONE_ROUND = by_hand(
    (Forward(0, 0), Send(1, F), Receive(1, G), Backward(0, 0)),
    (Receive(0, F), Forward(0, 0), Backward(0, 0), Send(0, G)),
)


def test_one_round_on_two_ranks():
    simulation = simulate(ONE_ROUND, UNIT, bytes_per_token=10)
    assert {(s.rank, type(s.task).__name__): (s.start, s.end) for s in simulation.spans} == {
        (0, "Forward"): (0, 1),
        (1, "Forward"): (1, 2),
        (1, "Backward"): (2, 5),
        (0, "Backward"): (5, 8),
    }
    assert (simulation.finish, simulation.busy, simulation.bubble) == (8, (4, 4), 1.0)
    assert simulation.peak_live_rounds == (1, 1)
    assert simulation.peak_waiting == (1, 1)
    assert simulation.link_bytes == {(0, 1): 10 * LENGTH, (1, 0): 10 * LENGTH}


def test_messages_take_their_time():
    assert simulate(ONE_ROUND, replace(UNIT, message=0.5)).finish == 9


def test_the_head_is_work_of_the_last_rank():
    assert simulate(ONE_ROUND, replace(UNIT, head=1.0)).busy == (4, 8)


def test_a_circle_of_receives_is_a_deadlock():
    circle = by_hand(
        (Receive(1, G), Forward(0, 0), Send(1, F), Backward(0, 0)),
        (Receive(0, F), Forward(0, 0), Backward(0, 0), Send(0, G)),
    )
    assert simulate(circle, UNIT).finish == 8
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits forever at Receive"):
        simulate(circle, UNIT, blocking_receives=True)


def test_sends_that_meet_no_receive_are_a_deadlock_where_they_block():
    own, other = Message(Kind.FEATURES, 0, 0, 0), Message(Kind.FEATURES, 1, 0, 0)
    crossed = by_hand(
        (Forward(0, 0), Send(1, own), Receive(1, other), Forward(1, 0)),
        (Send(0, other), Receive(0, own), Forward(0, 0)),
        num_sequences=2,
    )
    assert simulate(crossed, UNIT).finish == 2
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(crossed, UNIT, rendezvous_sends=True)


def test_a_task_whose_message_never_comes_is_a_deadlock():
    with pytest.raises(ScheduleError, match=r"deadlock: rank 1 waits forever at Forward\(micro_batch=0, round=0\)"):
        simulate(by_hand((Forward(0, 0),), (Receive(0, F), Forward(0, 0))), UNIT)


def test_another_order_of_sends_than_of_receives_is_refused():
    first, second = Message(Kind.FEATURES, 0, 0, 0), Message(Kind.FEATURES, 1, 0, 0)
    swapped = by_hand(
        (Forward(0, 0), Send(1, first), Forward(1, 0), Send(1, second)),
        (Receive(0, second), Receive(0, first), Forward(0, 0), Forward(1, 0)),
        num_sequences=2,
    )
    with pytest.raises(ScheduleError, match="rank 1 does not receive what rank 0 sends it"):
        simulate(swapped, UNIT)


def test_a_message_that_nobody_reads_is_refused():
    with pytest.raises(ScheduleError, match="rank 1 receives what no later task reads"):
        simulate(by_hand((Forward(0, 0), Send(1, F)), (Receive(0, F),)), UNIT)


def test_bytes_of_a_step():
    """Three links carry the features and gradients of each round; a fourth closes the ring for fed-back rounds."""
    rounds = plan(3, 2)
    link_bytes = simulate(schedule([rounds] * 4, even_stages(4)), bytes_per_token=1).link_bytes
    along, back = 4 * len(rounds) * LENGTH, 4 * sum(r.feeds_back for r in rounds) * LENGTH
    lines = {(a, b): along for a in range(4) for b in range(4) if abs(a - b) == 1}
    assert link_bytes == lines | {(3, 0): back, (0, 3): back}


def test_only_the_rows_that_sleep_are_sent_back():
    facts = [
        WindowFacts(0, LENGTH, (True, True), (False, True)),
        WindowFacts(LENGTH, 2 * LENGTH, (True,) * 2, (False,) * 2),
    ]
    link_bytes = simulate(schedule([plan_rounds(facts, 2)], even_stages(3)), bytes_per_token=1).link_bytes
    assert link_bytes[2, 0] == link_bytes[0, 2] == LENGTH
    assert link_bytes[0, 1] == (2 + 1 + 2) * LENGTH

"""Features and their gradients between rounds and stages: exactly one other rank reads each message."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings

from sleeptrain.parallel.pipeline.feature_flow import FeatureFlow, Held
from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Backward, Forward, Receive, Schedule, Send, schedule
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.rounds import Round
from tests.parallel.pipeline.cases import any_plans, any_stages, even_stages, plan


def messages(made: Schedule, rank: int, incoming: bool) -> Counter[Message]:
    """The messages that a rank sends and receives by the rules while it works through its list."""
    flow, found = FeatureFlow(made, rank), Counter[Message]()
    for action in made.ranks[rank]:
        match action:
            case Forward(seq, index):
                places = [place for _, place in flow.reads(seq, index)]
                outgoing = [message for _, message in flow.passes_on(seq, index)]
            case Backward(seq, index):
                places = [message for _, message in flow.gradients_in(seq, index)]
                outgoing = [place for place in flow.gradients_out(seq, index) if isinstance(place, Message)]
            case _:
                continue
        found.update(place for place in places if isinstance(place, Message)) if incoming else found.update(outgoing)
    return found


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(plans=any_plans(), stages=any_stages())
def test_they_are_the_messages_of_the_schedule(plans: list[list[Round]], stages: PipelineStages) -> None:
    made = schedule(plans, stages)
    for rank, actions in enumerate(made.ranks):
        sent, received = (
            Counter(a.message for a in actions if isinstance(a, kind) and isinstance(a.message, Message))
            for kind in (Send, Receive)
        )
        assert messages(made, rank, incoming=False) == sent
        assert messages(made, rank, incoming=True) == received


def test_a_pass_without_feedback_reads_the_core_input_of_its_wake_round() -> None:
    flow = FeatureFlow(schedule([plan(2, 3, feedback="none")], even_stages(1)), 0)
    assert flow.reads(0, 0) == [] and flow.reads(0, 2) == [(0, Held(0, "core_input_RLD"))]
    assert flow.gradients_out(0, 2) == [Held(0, "core_input_RLD")]


def test_a_pass_reads_the_core_output_of_the_pass_before() -> None:
    flow = FeatureFlow(schedule([plan(2, 3)], even_stages(1)), 0)
    assert [flow.reads(0, index) for index in (1, 2)] == [[(i, Held(i, "core_output_RLD"))] for i in (0, 1)]
    assert flow.passes_on(0, 0) == flow.gradients_in(0, 0) == []


def test_fed_back_features_travel_from_the_last_stage_of_the_core_to_its_first() -> None:
    made = schedule([plan(2, 2)], even_stages(2))
    first, last = (FeatureFlow(made, rank) for rank in range(2))
    back = Message(Kind.FEATURES, 0, 0, 1)
    assert first.reads(0, 1) == [(0, back)] and ("core_output_RLD", back) in last.passes_on(0, 0)
    gradient = Message(Kind.GRADIENT, 0, 1, 0)
    assert first.gradients_out(0, 1) == [gradient] and ("core_output_RLD", gradient) in last.gradients_in(0, 0)
    assert made.plans[0][0] == last.shape_of(gradient) == last.shape_of(back)


def test_outputs_last_as_long_as_their_window() -> None:
    flow = FeatureFlow(schedule([plan(2, 2)], even_stages(1)), 0)
    assert flow.expired(0, 1, [0]) == [] and flow.expired(0, 2, [0, 1]) == [0, 1]

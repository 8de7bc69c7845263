"""The task graph of a step, against dependencies that are written out by hand."""

from __future__ import annotations

from sleeptrain.parallel.pipeline.graph import Direction, HeadMessage, Kind, Message, Sent, Task, build_graph
from tests.parallel.pipeline.cases import even_stages, plan


def forward(round_index: int, stage: int, micro_batch: int = 0) -> Task:
    return Task(Direction.FORWARD, micro_batch, round_index, stage)


def backward(round_index: int, stage: int, micro_batch: int = 0) -> Task:
    return Task(Direction.BACKWARD, micro_batch, round_index, stage)


def test_one_round_goes_down_the_stages_and_its_gradient_up() -> None:
    graph = build_graph([plan(1, 1)], even_stages(2))
    assert {task: set(before) for task, before in graph.before.items()} == {
        forward(0, 0): set(),
        forward(0, 1): {forward(0, 0)},
        backward(0, 1): {forward(0, 1)},
        backward(0, 0): {forward(0, 0), backward(0, 1)},
    }
    assert graph.sent == [
        Sent(Message(Kind.FEATURES, 0, 0, 0), forward(0, 0), forward(0, 1)),
        Sent(Message(Kind.GRADIENT, 0, 0, 0), backward(0, 1), backward(0, 0)),
    ]


def test_a_pass_waits_for_the_features_of_the_last_stage_and_for_its_own_state() -> None:
    graph = build_graph([plan(2, 2)], even_stages(2))
    assert set(graph.before[forward(1, 0)]) == {forward(0, 1), forward(0, 0)}
    assert set(graph.before[forward(2, 0)]) == {forward(1, 0)}, "another window reads no features, but the state"
    assert set(graph.before[backward(0, 1)]) == {forward(0, 1), backward(1, 1), backward(1, 0)}
    assert Sent(Message(Kind.FEATURES, 0, 0, 1), forward(0, 1), forward(1, 0)) in graph.sent


def test_rounds_after_the_last_loss_have_no_backward_and_get_no_gradient() -> None:
    graph = build_graph([plan(1, 2, goes_on=True)], even_stages(2))
    assert {task.round for task in graph.before if task.direction is Direction.FORWARD} == {0, 1}
    assert {task.round for task in graph.before if task.direction is Direction.BACKWARD} == {0}
    assert {sent.message.reader for sent in graph.sent if sent.message.kind is Kind.GRADIENT} == {0}


def test_micro_batches_wait_for_nothing_of_each_other() -> None:
    graph = build_graph([plan(2, 2)] * 2, even_stages(2))
    assert all(other.micro_batch == task.micro_batch for task, before in graph.before.items() for other in before)
    assert len(graph.before) == 2 * len(build_graph([plan(2, 2)], even_stages(2)).before)


def test_a_shared_head_runs_between_forward_and_backward_of_the_last_stage() -> None:
    graph = build_graph([plan(1, 1)], even_stages(2, split_head=True))
    ahead, back = ([Task(d, 0, 0, s) for s in (0, 1)] for d in (Direction.HEAD_FORWARD, Direction.HEAD_BACKWARD))
    assert {task: set(before) for task, before in graph.before.items()} == {
        forward(0, 0): set(),
        forward(0, 1): {forward(0, 0)},
        ahead[0]: {forward(0, 1)},
        ahead[1]: {forward(0, 1), ahead[0]},
        back[0]: {ahead[1]},
        back[1]: {ahead[1], back[0]},
        backward(0, 1): {forward(0, 1), back[1]},
        backward(0, 0): {forward(0, 0), backward(0, 1)},
    }
    head = [sent for sent in graph.sent if isinstance(sent.message, HeadMessage)]
    assert [(sent.message.kind, sent.maker, sent.reader) for sent in head] == [
        (Kind.HEAD_INPUT, forward(0, 1), ahead[0]),
        (Kind.STATISTICS, ahead[0], ahead[1]),
        (Kind.LOG_SUMS, ahead[1], back[0]),
        (Kind.HEAD_GRADIENT, back[0], back[1]),
    ]


def test_one_stage_sends_nothing() -> None:
    assert build_graph([plan(2, 3)], even_stages(1)).sent == []

"""The task graph of a step: a task for each (micro-batch, round, stage) and direction, and the tasks it waits for.

A forward reads features and S. Features come from the previous stage; on the core's first stage they come from the
core's last stage, as output of the previous pass. S never leaves its stage and comes from the previous round of the
micro-batch. Gradients take the same ways in reverse.

Where the stages share the head, a round with a loss has two more tasks on each stage, both between its forward and its
backward on the last stage. The forward of the head turns the features at the targets into logits of the stage's part of
the vocabulary, and these into statistics. On the last stage it comes last: it joins all statistics to the loss. The
backward of the head computes gradients from the joined statistics; on the last stage it, too, comes last, and sums the
gradients of the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from sleeptrain.parallel.pipeline.stages import PipelineStages, feature_sources, num_trained
from sleeptrain.sleep.rounds import Round


class Kind(IntEnum):
    """Content of a message.

    FEATURES, GRADIENT: features, or the gradient of the loss with respect to features.
    HEAD_INPUT, HEAD_GRADIENT: the normed features at the targets of a round, or a part's gradient of them.
    STATISTICS: what the logits of a part contribute to the loss. LOG_SUMS: the joined log-sum-exp of all parts.
    """

    FEATURES = 0
    GRADIENT = 1
    HEAD_INPUT = 2
    STATISTICS = 3
    LOG_SUMS = 4
    HEAD_GRADIENT = 5


class Direction(IntEnum):
    """What a task does: a direction of a round's layers, or of a stage's part of the head."""

    FORWARD = 0
    BACKWARD = 1
    HEAD_FORWARD = 2
    HEAD_BACKWARD = 3


class Task(NamedTuple):
    """One direction of a round of a micro-batch on a stage; `round` is its index in the micro-batch's plan."""

    direction: Direction
    micro_batch: int
    round: int
    stage: int


class Message(NamedTuple):
    """Features, or their gradient, sent from the round that makes them to the round that reads them.

    source == reader: sent between neighbouring stages within a round; otherwise between the ends of the ring.
    """

    kind: Kind
    micro_batch: int
    source: int
    reader: int


class HeadMessage(NamedTuple):
    """A message between the last stage and stage `part`, about that stage's part of the head in a round."""

    kind: Kind
    micro_batch: int
    round: int
    part: int


AnyMessage = Message | HeadMessage


class Sent(NamedTuple):
    """A message, the task that makes it, and the task on another stage that reads it."""

    message: AnyMessage
    maker: Task
    reader: Task


@dataclass(frozen=True)
class Graph:
    """The tasks of a step and their dependencies.

    before: for every task, the tasks that must end before it starts.
    sent: every message between stages.
    """

    before: dict[Task, list[Task]] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)


class _Visit(NamedTuple):
    """A round on a stage."""

    round: int
    stage: int


def build_graph(plans: Sequence[Sequence[Round]], stages: PipelineStages) -> Graph:
    """The task graph of a step. plans: the rounds of each micro-batch.

    Rounds after a micro-batch's last loss have no backward: no gradient reaches them. They only prepare the memory that
    the next step begins with.
    """
    graph = Graph()
    for mb, rounds in enumerate(plans):
        _add_micro_batch(graph, mb, rounds, stages)
    return graph


def _add_micro_batch(graph: Graph, mb: int, rounds: Sequence[Round], stages: PipelineStages) -> None:
    features, state = _forward_reads(rounds, stages)
    # A round with a loss visits every stage, and on each it reads the state that all earlier rounds have written.
    trained_rounds = num_trained(rounds)
    for visit, sources in features.items():
        forward, backward = (Task(direction, mb, *visit) for direction in (Direction.FORWARD, Direction.BACKWARD))
        before = [*sources, *state[visit]]
        graph.before[forward] = [Task(Direction.FORWARD, mb, *v) for v in before]
        trained = visit.round < trained_rounds
        if trained:
            graph.before.setdefault(backward, []).append(forward)
            for v in before:
                graph.before.setdefault(Task(Direction.BACKWARD, mb, *v), []).append(backward)
        for v in sources:
            if v.stage != visit.stage:
                graph.sent.extend(_messages(mb, v, visit, trained))
    if stages.split_head:
        for index, r in enumerate(rounds):
            if r.loss:
                _add_head(graph, mb, index, stages.num_stages)


def _add_head(graph: Graph, mb: int, index: int, num_stages: int) -> None:
    """Add the tasks of the head in a round with a loss. Such a round visits every stage and has a backward."""
    last = num_stages - 1

    def tasks(direction: Direction) -> list[Task]:
        return [Task(direction, mb, index, stage) for stage in range(num_stages)]

    forwards, backwards = tasks(Direction.HEAD_FORWARD), tasks(Direction.HEAD_BACKWARD)
    source, reader = Task(Direction.FORWARD, mb, index, last), Task(Direction.BACKWARD, mb, index, last)
    graph.before.update({task: [source] for task in forwards} | {task: [forwards[last]] for task in backwards})
    graph.before[forwards[last]] += forwards[:last]
    graph.before[backwards[last]] += backwards[:last]
    graph.before[reader].append(backwards[last])
    for part in range(last):
        sent = (
            (Kind.HEAD_INPUT, source, forwards[part]),
            (Kind.STATISTICS, forwards[part], forwards[last]),
            (Kind.LOG_SUMS, forwards[last], backwards[part]),
            (Kind.HEAD_GRADIENT, backwards[part], backwards[last]),
        )
        graph.sent.extend(Sent(HeadMessage(kind, mb, index, part), *ends) for kind, *ends in sent)


def _messages(mb: int, source: _Visit, reader: _Visit, trained: bool) -> Iterable[Sent]:
    features = Message(Kind.FEATURES, mb, source.round, reader.round)
    yield Sent(features, Task(Direction.FORWARD, mb, *source), Task(Direction.FORWARD, mb, *reader))
    if trained:
        gradient = Message(Kind.GRADIENT, mb, reader.round, source.round)
        yield Sent(gradient, Task(Direction.BACKWARD, mb, *reader), Task(Direction.BACKWARD, mb, *source))


Reads = dict[_Visit, list[_Visit]]


def _forward_reads(rounds: Sequence[Round], stages: PipelineStages) -> tuple[Reads, Reads]:
    """For each round on each stage that it visits: the visits whose features it reads, and whose state it reads.

    The visits are in the order in which a single process would run them.
    """
    features: Reads = {}
    state: Reads = {}
    last_on: dict[int, _Visit] = {}
    for index, sources in enumerate(feature_sources(rounds)):
        visited = stages.visited(rounds[index])
        for stage in visited:
            visit = _Visit(index, stage)
            begins = stage == visited.start
            features[visit] = [_Visit(i, stages.last_core) for i in sources] if begins else [_Visit(index, stage - 1)]
            state[visit] = [last_on[stage]] if stage in last_on else []
            last_on[stage] = visit
    return features, state

"""The task graph of a step: a task for each (micro-batch, round, stage) and direction, and the tasks it waits for.

A forward reads features and S. Features come from the previous stage; on the core's first stage they come from the
core's last stage, as output of the previous pass. S never leaves its stage and comes from the previous round of the
micro-batch. Gradients take the same ways in reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from sleeptrain.parallel.pipeline.stages import PipelineStages, feature_sources, num_trained
from sleeptrain.sleep.rounds import Round


class Kind(IntEnum):
    """Content of a message: features, or the gradient of the loss with respect to features."""

    FEATURES = 0
    GRADIENT = 1


class Task(NamedTuple):
    """One direction of a round of a micro-batch on a stage; `round` is its index in the micro-batch's plan."""

    backward: bool
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


class Sent(NamedTuple):
    """A message, the task that makes it, and the task on another stage that reads it."""

    message: Message
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
        forward = Task(False, mb, *visit)
        before = [*sources, *state[visit]]
        graph.before[forward] = [Task(False, mb, *v) for v in before]
        trained = visit.round < trained_rounds
        if trained:
            graph.before.setdefault(Task(True, mb, *visit), []).append(forward)
            for v in before:
                graph.before.setdefault(Task(True, mb, *v), []).append(Task(True, mb, *visit))
        for v in sources:
            if v.stage != visit.stage:
                graph.sent.extend(_messages(mb, v, visit, trained))


def _messages(mb: int, source: _Visit, reader: _Visit, trained: bool) -> Iterable[Sent]:
    features = Message(Kind.FEATURES, mb, source.round, reader.round)
    yield Sent(features, Task(False, mb, *source), Task(False, mb, *reader))
    if trained:
        gradient = Message(Kind.GRADIENT, mb, reader.round, source.round)
        yield Sent(gradient, Task(True, mb, *reader), Task(True, mb, *source))


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

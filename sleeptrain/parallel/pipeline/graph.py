"""What a step must do: a task for each (sequence, round, stage) and direction, and which tasks wait for which.

Forward: a stage reads the features of the stage before; the core's first stage reads those that the pass before left on
the core's last; and S, which never leaves its stage, as the sequence's round before left it there. The backward goes
the same ways in reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from sleeptrain.parallel.pipeline.stages import PipelineStages, feature_sources, num_trained
from sleeptrain.sleep.rounds import Round


class Kind(IntEnum):
    """What a message holds: features, or the gradient of the loss in them."""

    FEATURES = 0
    GRADIENT = 1


class Task(NamedTuple):
    """One direction of a round of a sequence on a stage; `round` is its index in the sequence's plan."""

    backward: bool
    seq: int
    round: int
    stage: int


class Message(NamedTuple):
    """Features, or their gradient, on the way from the round that makes them to the round that reads them.

    source == reader: between neighbouring stages within a round; otherwise between the ends of the ring.
    """

    kind: Kind
    seq: int
    source: int
    reader: int


class Sent(NamedTuple):
    """A message with the task that makes it and the task, on another stage, that reads it."""

    message: Message
    maker: Task
    reader: Task


@dataclass(frozen=True)
class Graph:
    """before: for every task those that must have ended when it starts. sent: every message between stages."""

    before: dict[Task, list[Task]] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)


class _Visit(NamedTuple):
    """A round on a stage."""

    round: int
    stage: int


def build_graph(plans: Sequence[Sequence[Round]], stages: PipelineStages) -> Graph:
    """The tasks of a step. plans: the rounds of each sequence.

    A backward exists where a gradient arrives: not for the rounds behind a sequence's last loss, which only prepare the
    memory that the next step begins with.
    """
    graph = Graph()
    for seq, rounds in enumerate(plans):
        _add_sequence(graph, seq, rounds, stages)
    return graph


def _add_sequence(graph: Graph, seq: int, rounds: Sequence[Round], stages: PipelineStages) -> None:
    features, state = _forward_reads(rounds, stages)
    # A round with a loss visits every stage and reads there the state that all rounds before it have written.
    trained_rounds = num_trained(rounds)
    for visit, sources in features.items():
        forward = Task(False, seq, *visit)
        before = [*sources, *state[visit]]
        graph.before[forward] = [Task(False, seq, *v) for v in before]
        trained = visit.round < trained_rounds
        if trained:
            graph.before.setdefault(Task(True, seq, *visit), []).append(forward)
            for v in before:
                graph.before.setdefault(Task(True, seq, *v), []).append(Task(True, seq, *visit))
        for v in sources:
            if v.stage != visit.stage:
                graph.sent.extend(_messages(seq, v, visit, trained))


def _messages(seq: int, source: _Visit, reader: _Visit, trained: bool) -> Iterable[Sent]:
    features = Message(Kind.FEATURES, seq, source.round, reader.round)
    yield Sent(features, Task(False, seq, *source), Task(False, seq, *reader))
    if trained:
        gradient = Message(Kind.GRADIENT, seq, reader.round, source.round)
        yield Sent(gradient, Task(True, seq, *reader), Task(True, seq, *source))


Reads = dict[_Visit, list[_Visit]]


def _forward_reads(rounds: Sequence[Round], stages: PipelineStages) -> tuple[Reads, Reads]:
    """For every round on every stage it visits, in the order of one process, whose features and state it reads."""
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

"""The pipeline's schedule: what each rank does in a step, in which order, as plain data.

A pure function of the round plans. A rank runs its list from top to bottom; the lists cannot wait for each other in a
circle, whether sends and receives return at once or block until both sides are there. The reason: each list is the
rank's share of one order of all tasks and messages, tasks by the time they end in the simulation, messages by the time
they are sent, and nothing waits for anything behind it in that order. So the sends from one rank to another are also in
the order of its receives, which is what NCCL matches them by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.graph import Graph, Message, Task, build_graph
from sleeptrain.parallel.pipeline.scheduler import form_groups, order_tasks, timed
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class Forward:
    """Run the rank's layers of a round: `round` is an index into the plan of sequence `seq`.

    On the last rank, where the round has a loss, the head and the loss too.
    """

    seq: int
    round: int


@dataclass(frozen=True)
class Backward:
    """Run the round again on this rank and propagate the gradients of its loss, features and state."""

    seq: int
    round: int


@dataclass(frozen=True)
class Send:
    """Send a message, whose task has been done, to rank `peer`."""

    peer: int
    message: Message


@dataclass(frozen=True)
class Receive:
    """Post the receive of a message from rank `peer`; the task that reads it comes later in the list and waits."""

    peer: int
    message: Message


Compute = Forward | Backward
Action = Compute | Send | Receive


@dataclass(frozen=True)
class Schedule:
    """A step. plans: the rounds of each sequence. ranks: the actions of each rank, one for each stage."""

    plans: tuple[tuple[Round, ...], ...]
    stages: PipelineStages
    ranks: tuple[tuple[Action, ...], ...]


def schedule(
    plans: Sequence[Sequence[Round]],
    stages: PipelineStages,
    costs: Costs | None = None,
    max_live_sequences: int | None = None,
) -> Schedule:
    """The actions of every rank in one step of several sequences.

    plans: of each sequence (a micro-batch of rows that goes through the pipeline as one). costs: what the order is made
    for (default: `Costs()`). max_live_sequences: sequences enter in groups of at most so many, and a rank keeps no more
    rounds alive than one group has there, and p - w where the ring covers only w of p stages. Below w ranks wait for
    the ring; more than w sequences hide the time that messages take. Default: the smallest groups of at least w.

    For p balanced stages and m >= p sequences of R rounds, all of them trained and fed back through all stages, a step
    takes (p - 1) / (m R) longer than the work alone (docs/pipeline.md).

    Gradients of parameters are complete at the end of a rank's list: they are reduced there, once a step.
    Raises ConfigError for a `max_live_sequences` below 1.
    """
    if max_live_sequences is not None and max_live_sequences < 1:
        raise ConfigError(f"max_live_sequences is {max_live_sequences}; a pipeline needs at least 1 sequence in flight")
    graph = build_graph(plans, stages)
    group_of = form_groups(len(plans), stages.ring_width(plans), max_live_sequences)
    ends = _best_order(graph, plans, stages, costs or Costs(), group_of)
    return Schedule(tuple(tuple(rounds) for rounds in plans), stages, _lists(graph, ends, stages.num_stages))


def _best_order(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs, group_of: Sequence[int]
) -> dict[Task, float]:
    """The better of two orders: one made in the times given, good for stages that are not balanced, and one made with
    backwards as short as forwards, in which balanced stages keep step whatever the two really cost."""
    in_step = order_tasks(graph, plans, stages, replace(costs, backward=costs.forward), group_of)
    orders = [timed(in_step, graph, plans, stages, costs), order_tasks(graph, plans, stages, costs, group_of)]
    return min(orders, key=lambda ends: max(ends.values(), default=0.0))


# (time, message or not, link, message): the place of an action in the one order of all ranks.
_Place = tuple[float, bool, tuple[int, ...], tuple[int, ...]]


def _lists(graph: Graph, ends: dict[Task, float], num_ranks: int) -> tuple[tuple[Action, ...], ...]:
    """Each rank's share of the one order. A receive comes before the first task that ends after the message was sent:
    one task early, so that the message travels while the rank works."""
    placed: list[list[tuple[_Place, Action]]] = [[] for _ in range(num_ranks)]
    for task, end in ends.items():
        action = Backward(task.seq, task.round) if task.backward else Forward(task.seq, task.round)
        placed[task.stage].append(((end, False, (), ()), action))
    for message, maker, reader in graph.sent:
        place = (ends[maker], True, (maker.stage, reader.stage), tuple(message))
        placed[maker.stage].append((place, Send(reader.stage, message)))
        placed[reader.stage].append((place, Receive(maker.stage, message)))
    return tuple(tuple(action for _, action in sorted(actions, key=lambda a: a[0])) for actions in placed)

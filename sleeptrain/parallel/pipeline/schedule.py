"""The pipeline's schedule: an ordered list of actions for each rank, as plain data.

It is a pure function of the round plans. A rank runs its list from top to bottom. The lists cannot deadlock, whether
sends and receives return at once or block until both sides have posted them: each list is the rank's share of one
global order of all tasks and messages (tasks by their simulated end, messages by the time they are sent), and no action
waits for a later one. So the sends from one rank to another are in the order of the receives, by which NCCL matches
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.graph import AnyMessage, Direction, Graph, Task, build_graph
from sleeptrain.parallel.pipeline.scheduler import form_groups, order_tasks, timed
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class Forward:
    """Run the rank's layers of a round: `round` is an index into the plan of micro-batch `micro_batch`.

    On the last rank, a round with a loss also runs the head and the loss, unless the stages share the head.
    """

    micro_batch: int
    round: int


@dataclass(frozen=True)
class Backward:
    """Run the round again on this rank and propagate the gradients of its loss, features and state."""

    micro_batch: int
    round: int


@dataclass(frozen=True)
class HeadForward:
    """Compute the statistics of a round's logits in the rank's part of the head; on the last rank also the loss."""

    micro_batch: int
    round: int


@dataclass(frozen=True)
class HeadBackward:
    """Compute the gradients of the rank's part of the head; on the last rank also sum those of the features."""

    micro_batch: int
    round: int


@dataclass(frozen=True)
class Send:
    """Send a message to rank `peer`. The task that makes the message is above in the list."""

    peer: int
    message: AnyMessage


@dataclass(frozen=True)
class Receive:
    """Post the receive of a message from rank `peer`. The task that reads it is below in the list, and waits for it."""

    peer: int
    message: AnyMessage


Compute = Forward | Backward | HeadForward | HeadBackward
ACTIONS: dict[Direction, type[Compute]] = {
    Direction.FORWARD: Forward,
    Direction.BACKWARD: Backward,
    Direction.HEAD_FORWARD: HeadForward,
    Direction.HEAD_BACKWARD: HeadBackward,
}
DIRECTIONS = {action: direction for direction, action in ACTIONS.items()}
Action = Compute | Send | Receive


@dataclass(frozen=True)
class Schedule:
    """The schedule of a step.

    plans: the rounds of each micro-batch.
    ranks: the actions of each rank, in order; rank s holds stage s.
    """

    plans: tuple[tuple[Round, ...], ...]
    stages: PipelineStages
    ranks: tuple[tuple[Action, ...], ...]


def schedule(
    plans: Sequence[Sequence[Round]],
    stages: PipelineStages,
    costs: Costs | None = None,
    max_live_micro_batches: int | None = None,
) -> Schedule:
    """Make the actions of every rank for one step of several micro-batches.

    plans: the rounds of each micro-batch.
    costs: the task times for which the order is made (default: `Costs()`).
    max_live_micro_batches: the most micro-batches in a group. Groups enter one after the other, and a rank keeps at
    most one group's rounds alive, plus p - w rounds where the ring covers only w of p stages. In a group of fewer than
    w micro-batches ranks wait for the ring; more than w hide the time of messages. Default: the smallest groups of at
    least w.

    For p balanced stages and m >= p micro-batches of R rounds, all of them trained and fed back through all stages, a
    step takes (p - 1) / (m R) longer than the work alone (docs/pipeline.md).

    Parameter gradients are complete at the end of a rank's list and are reduced there, once a step.
    Raises ConfigError for a `max_live_micro_batches` below 1.
    """
    if max_live_micro_batches is not None and max_live_micro_batches < 1:
        raise ConfigError(
            f"max_live_micro_batches is {max_live_micro_batches}; a pipeline needs at least 1 micro-batch in flight"
        )
    graph = build_graph(plans, stages)
    group_of = form_groups(len(plans), stages.ring_width(plans), max_live_micro_batches)
    ends = _best_order(graph, plans, stages, costs or Costs(), group_of)
    return Schedule(tuple(tuple(rounds) for rounds in plans), stages, _lists(graph, ends, stages.num_stages))


def _best_order(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs, group_of: Sequence[int]
) -> dict[Task, float]:
    """The shorter of two orders, as the end time of each task.

    One is made with `costs`, which suits unbalanced stages. The other is made as if a backward took as long as a
    forward: balanced stages then stay in step, whatever their real times.
    """
    equal_order = order_tasks(graph, plans, stages, replace(costs, backward=costs.forward), group_of)
    orders = [timed(equal_order, graph, plans, stages, costs), order_tasks(graph, plans, stages, costs, group_of)]
    return min(orders, key=lambda ends: max(ends.values(), default=0.0))


# (time, True for a message, (sender, receiver), message): the sort key of an action in the global order.
_SortKey = tuple[float, bool, tuple[int, ...], tuple[int, ...]]


def _lists(graph: Graph, ends: dict[Task, float], num_ranks: int) -> tuple[tuple[Action, ...], ...]:
    """Each rank's share of the global order.

    A receive stands above the first task that ends after the message is sent. So it is posted one task early, and the
    message travels while the rank works.
    """
    keyed: list[list[tuple[_SortKey, Action]]] = [[] for _ in range(num_ranks)]
    for task, end in ends.items():
        action = ACTIONS[task.direction](task.micro_batch, task.round)
        keyed[task.stage].append(((end, False, (), ()), action))
    for message, maker, reader in graph.sent:
        key = (ends[maker], True, (maker.stage, reader.stage), tuple(message))
        keyed[maker.stage].append((key, Send(reader.stage, message)))
        keyed[reader.stage].append((key, Receive(maker.stage, message)))
    return tuple(tuple(action for _, action in sorted(actions, key=lambda a: a[0])) for actions in keyed)

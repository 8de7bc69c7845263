"""The order of the tasks: list scheduling in simulated time, with one forward and one backward in turn (1F1B).

Micro-batches enter in groups that are large enough to keep the ring busy. A stage runs one round of all micro-batches
of a group, then the next round: while it works on the others, the features for a micro-batch's next pass come back.
While a group runs its backwards, forwards of the next group start as rounds of the first one end.

Tasks of the head go first: they are short, and features and logits wait for them in memory.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from sleeptrain.parallel.pipeline.graph import Direction, Graph, Task
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs, TaskTimes
from sleeptrain.sleep.rounds import Round

# Rounds that stages run while the others work on the head of a round: in its forward, and in its backward.
HEAD_SLACK = 2


def order_tasks(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs, group_of: Sequence[int]
) -> dict[Task, float]:
    """Schedule the tasks and return the time at which each ends. A stage runs one task at a time.

    The order keeps all dependencies. group_of: the group of each micro-batch, ascending. The number of live rounds on a
    stage (forward started, backward not yet ended) never exceeds `live_limits`.
    """
    followers: dict[Task, list[Task]] = defaultdict(list)
    for task, before in graph.before.items():
        for other in before:
            followers[other].append(task)
    waits = {task: len(before) for task, before in graph.before.items()}
    sizes, limits = _group_sizes(graph, stages, group_of), live_limits(graph, plans, stages, group_of)
    queues = [_Queue(graph, group_of, *arguments) for arguments in zip(sizes, limits, strict=True)]
    times = TaskTimes(plans, stages, costs)
    for task, count in waits.items():
        if count == 0:
            queues[task.stage].add(task)
    ends: dict[Task, float] = {}
    running: list[tuple[float, Task]] = []
    idle, now = [True] * stages.num_stages, 0.0
    changed = set(range(stages.num_stages))  # stages whose queue may have a task to start that it had not before
    while True:
        for stage in changed:
            if idle[stage] and (started := queues[stage].take()) is not None:
                heapq.heappush(running, (now + times.of(*started), started))
                idle[stage] = False
        if not running:
            return ends
        now, changed = running[0][0], set()
        # All tasks that end now must be counted before a stage chooses; else the choice would depend on stage numbers.
        while running and running[0][0] == now:
            _, ended = heapq.heappop(running)
            ends[ended] = now
            idle[ended.stage] = True
            changed.add(ended.stage)
            queues[ended.stage].done(ended)
            for task in followers[ended]:
                waits[task] -= 1
                if waits[task] == 0:
                    queues[task.stage].add(task)
                    changed.add(task.stage)


def timed(
    order: dict[Task, float], graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs
) -> dict[Task, float]:
    """The time at which each task ends if each stage keeps the order of `order`, with task times from `costs`."""
    ends: dict[Task, float] = {}
    free, times = [0.0] * stages.num_stages, TaskTimes(plans, stages, costs)
    for task in sorted(order, key=order.__getitem__):
        start = max([free[task.stage], *(ends[other] for other in graph.before[task])])
        ends[task] = free[task.stage] = start + times.of(*task)
    return ends


def form_groups(num_micro_batches: int, ring_width: int, max_live_micro_batches: int | None) -> list[int]:
    """Return the group of each micro-batch; groups are as equal as possible.

    Without a maximum: as many groups as possible with at least `ring_width` members each; in a smaller group stages
    would wait for the ring. With a maximum: as few groups as possible with at most `max_live_micro_batches` members.
    """
    if max_live_micro_batches is None:
        num_groups = max(num_micro_batches // ring_width, 1)
    else:
        num_groups = -(-num_micro_batches // max_live_micro_batches)
    return [mb * num_groups // num_micro_batches for mb in range(num_micro_batches)]


def live_limits(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, group_of: Sequence[int]
) -> list[int]:
    """The most rounds that may be alive on each stage: the rounds of the largest group, plus a slack.

    The slack is one round for each stage outside the ring, which gives a gradient the time to come back. Where the
    stages share the head, it is `HEAD_SLACK` more.
    """
    slack = stages.num_stages - stages.ring_width(plans) + HEAD_SLACK * stages.split_head
    return [max(sizes, default=0) + slack for sizes in _group_sizes(graph, stages, group_of)]


def _group_sizes(graph: Graph, stages: PipelineStages, group_of: Sequence[int]) -> list[list[int]]:
    """The number of rounds that have a backward, as [stage][group]."""
    sizes = [[0] * (max(group_of, default=-1) + 1) for _ in range(stages.num_stages)]
    for task in graph.before:
        if task.direction is Direction.BACKWARD:
            sizes[task.stage][group_of[task.micro_batch]] += 1
    return sizes


class _Queue:
    """The tasks of one stage that are ready to start, and the choice among them.

    If both directions are ready, they alternate: a forward then waits for at most one backward, and the ring, which has
    no slack, does not stall. The earliest round goes first among forwards, the latest among backwards. Before both go
    the backwards of the head, then its forwards.
    """

    def __init__(self, graph: Graph, group_of: Sequence[int], group_sizes: list[int], limit: int):
        self.graph, self.group_of, self.to_come, self.limit = graph, group_of, group_sizes, limit
        self.ready: dict[Direction, list[tuple[int, int, int, Task]]] = {direction: [] for direction in Direction}
        self.newest_group, self.num_live, self.last_backward = -1, 0, True

    def add(self, task: Task) -> None:
        backward = task.direction in (Direction.BACKWARD, Direction.HEAD_BACKWARD)
        priority = -task.round if backward else task.round
        heapq.heappush(self.ready[task.direction], (self.group_of[task.micro_batch], priority, task.micro_batch, task))

    def take(self) -> Task | None:
        """Remove and return the task that starts now; None if none may start."""
        for direction in (Direction.HEAD_BACKWARD, Direction.HEAD_FORWARD):
            if self.ready[direction]:
                return heapq.heappop(self.ready[direction])[-1]
        forward, backward = self._admitted(), bool(self.ready[Direction.BACKWARD])
        if not forward and not backward:
            return None
        self.last_backward = backward and not (forward and self.last_backward)
        chosen = Direction.BACKWARD if self.last_backward else Direction.FORWARD
        group, _, _, task = heapq.heappop(self.ready[chosen])
        if chosen is Direction.FORWARD and self._is_trained(task):
            self.newest_group = max(self.newest_group, group)
            self.to_come[group] -= 1
            self.num_live += 1
        return task

    def done(self, task: Task) -> None:
        self.num_live -= task.direction is Direction.BACKWARD

    def _admitted(self) -> bool:
        """True if the first forward may start.

        A group begins only if enough live rounds remain for all forwards that older groups have still to run. So the
        oldest group never waits, and no order ends in a deadlock.
        """
        if not self.ready[Direction.FORWARD]:
            return False
        group, _, _, task = self.ready[Direction.FORWARD][0]
        if group < self.newest_group or not self._is_trained(task):
            return True
        return self.num_live + sum(self.to_come[:group]) < self.limit

    def _is_trained(self, task: Task) -> bool:
        return Task(Direction.BACKWARD, *task[1:]) in self.graph.before

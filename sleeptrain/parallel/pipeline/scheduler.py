"""The order of the tasks: list scheduling in simulated time, one forward and one backward in turn (1F1B).

Sequences enter in groups that are large enough to keep the ring busy. Within a group a stage works round by round, all
sequences of the group in each, so that the features that a pass is waiting for come back when the stage is done with
the other sequences. While a group goes backward, the next one's forwards take the places that it gives up.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from sleeptrain.parallel.pipeline.graph import Graph, Task
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.rounds import Round


def order_tasks(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs, group_of: Sequence[int]
) -> dict[Task, float]:
    """The time at which every task ends, in an order that keeps all dependencies; a stage does one task at a time.

    group_of: the group of each sequence, ascending. Rounds alive on a stage (forward started, backward not yet ended)
    never exceed `live_limits`.
    """
    followers: dict[Task, list[Task]] = defaultdict(list)
    for task, before in graph.before.items():
        for other in before:
            followers[other].append(task)
    waits = {task: len(before) for task, before in graph.before.items()}
    sizes, limits = _group_sizes(graph, stages, group_of), live_limits(graph, plans, stages, group_of)
    queues = [_Queue(graph, group_of, *its) for its in zip(sizes, limits, strict=True)]
    for task, count in waits.items():
        if count == 0:
            queues[task.stage].add(task)
    ends: dict[Task, float] = {}
    running: list[tuple[float, Task]] = []
    idle, now = set(range(stages.num_stages)), 0.0
    while True:
        for stage in sorted(idle):
            if (chosen := queues[stage].take()) is not None:
                time = costs.time(plans[chosen.seq][chosen.round], stages, stage, chosen.backward)
                heapq.heappush(running, (now + time, chosen))
                idle.remove(stage)
        if not running:
            return ends
        now = running[0][0]
        # All that end now must be counted before any stage chooses, or the choice would hang on the stages' numbers.
        while running and running[0][0] == now:
            _, ended = heapq.heappop(running)
            ends[ended] = now
            idle.add(ended.stage)
            queues[ended.stage].done(ended)
            for task in followers[ended]:
                waits[task] -= 1
                if waits[task] == 0:
                    queues[task.stage].add(task)


def timed(
    order: dict[Task, float], graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs
) -> dict[Task, float]:
    """The time at which every task ends where each stage keeps the order of `order` but tasks take other times."""
    ends: dict[Task, float] = {}
    free = [0.0] * stages.num_stages
    for task in sorted(order, key=order.__getitem__):
        start = max([free[task.stage], *(ends[other] for other in graph.before[task])])
        time = costs.time(plans[task.seq][task.round], stages, task.stage, task.backward)
        ends[task] = free[task.stage] = start + time
    return ends


def form_groups(num_sequences: int, ring_width: int, max_live_sequences: int | None) -> list[int]:
    """The group of each sequence, groups as equal as possible.

    Without a maximum: as many groups as there can be of at least `ring_width`; a smaller one would leave stages waiting
    for the ring. With one: as few groups as there can be of at most so many.
    """
    if max_live_sequences is None:
        num_groups = max(num_sequences // ring_width, 1)
    else:
        num_groups = -(-num_sequences // max_live_sequences)
    return [seq * num_groups // num_sequences for seq in range(num_sequences)]


def live_limits(
    graph: Graph, plans: Sequence[Sequence[Round]], stages: PipelineStages, group_of: Sequence[int]
) -> list[int]:
    """Of each stage, the most rounds that may be alive there: those of the largest group and, where the ring is
    narrower than the pipeline, one for each stage that it leaves out, so that a gradient has time to come back."""
    slack = stages.num_stages - stages.ring_width(plans)
    return [max(sizes, default=0) + slack for sizes in _group_sizes(graph, stages, group_of)]


def _group_sizes(graph: Graph, stages: PipelineStages, group_of: Sequence[int]) -> list[list[int]]:
    """[stage][group]: the rounds that have a backward."""
    sizes = [[0] * (max(group_of, default=-1) + 1) for _ in range(stages.num_stages)]
    for task in graph.before:
        if task.backward:
            sizes[task.stage][group_of[task.seq]] += 1
    return sizes


class _Queue:
    """The tasks of one stage that could start now, and which of them does.

    With both directions at hand they take turns: a stage then passes a forward on after at most one backward, and the
    ring, which has no time to spare, does not stall. Forwards are early rounds first, backwards late ones first.
    """

    def __init__(self, graph: Graph, group_of: Sequence[int], group_sizes: list[int], limit: int):
        self.graph, self.group_of, self.to_come, self.limit = graph, group_of, group_sizes, limit
        self.ready: tuple[list[tuple[int, int, int, Task]], ...] = ([], [])
        self.newest_group, self.num_live, self.last_backward = -1, 0, True

    def add(self, task: Task) -> None:
        wave = -task.round if task.backward else task.round
        heapq.heappush(self.ready[task.backward], (self.group_of[task.seq], wave, task.seq, task))

    def take(self) -> Task | None:
        """The task that starts now, if any."""
        forward, backward = self._admitted(), bool(self.ready[True])
        if not forward and not backward:
            return None
        self.last_backward = backward and not (forward and self.last_backward)
        group, _, _, task = heapq.heappop(self.ready[self.last_backward])
        if not task.backward and self._is_trained(task):
            self.newest_group = max(self.newest_group, group)
            self.to_come[group] -= 1
            self.num_live += 1
        return task

    def done(self, task: Task) -> None:
        self.num_live -= task.backward

    def _admitted(self) -> bool:
        """Whether the first forward may start. A group begins only where the older ones keep places for all they have
        still to bring, so that the oldest one is never held up: this is why no order ends in a deadlock."""
        if not self.ready[False]:
            return False
        group, _, _, task = self.ready[False][0]
        if group < self.newest_group or not self._is_trained(task):
            return True
        return self.num_live + sum(self.to_come[:group]) < self.limit

    def _is_trained(self, task: Task) -> bool:
        return task._replace(backward=True) in self.graph.before

"""A time that no schedule of a step beats, which takes no schedule and no simulation to find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sleeptrain.parallel.pipeline.graph import Direction
from sleeptrain.parallel.pipeline.stages import PipelineStages, feature_sources, num_trained
from sleeptrain.parallel.pipeline.task_costs import Costs
from sleeptrain.sleep.rounds import Round


def least_times(plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs) -> tuple[list[float], float]:
    """(the time that each rank works, a time before which no schedule of these plans can end), without a simulation.

    A stage begins when the first round has come to it. The backward of that round is the stage's last one, and goes
    back to the first stage. And no micro-batch is faster than its tasks one after the other, where they wait.
    """
    busy, trained_busy = [0.0] * stages.num_stages, [0.0] * stages.num_stages
    for (r, trained), times in _rounds_with_counts(plans, stages).items():
        for s in stages.visited(r):
            directions = [Direction.FORWARD, *([Direction.BACKWARD] if trained else [])]
            if r.loss and stages.split_head:
                directions += [Direction.HEAD_FORWARD, Direction.HEAD_BACKWARD]
            work = times * sum(costs.time(r, stages, s, direction) for direction in directions)
            busy[s] += work
            trained_busy[s] += work * trained
    least = max(busy, default=0.0)
    if sum(busy) > least * len(plans):  # else a micro-batch takes less than that even without any overlap
        least = max([least, *(_longest_path(rounds, stages, costs) for rounds, _ in _with_counts(plans))])
    first = plans[0][0] if plans and plans[0] else None
    if first is None or any(rounds[:1] != (first,) or not num_trained(rounds) for rounds, _ in _with_counts(plans)):
        return busy, least
    there = back = 0.0
    for s in stages.visited(first):
        least = max(least, there + busy[s], there + trained_busy[s] + back)
        there += costs.time(first, stages, s, Direction.FORWARD)
        back += costs.time(first, stages, s, Direction.BACKWARD)
    return busy, least


def _rounds_with_counts(plans: Sequence[Sequence[Round]], stages: PipelineStages) -> dict[tuple[Round, bool], int]:
    """(round, it has a backward) with its count; one round stands for all that take as long on the same stages."""
    known: dict[tuple[range, int, bool, bool], tuple[Round, bool]] = {}
    counts: Counter[tuple[Round, bool]] = Counter()
    for rounds, times in _with_counts(plans):
        trained = num_trained(rounds)
        for index, r in enumerate(rounds):
            key = (stages.layers_of(r), len(r.rows) * r.length, r.loss, index < trained)
            counts[known.setdefault(key, (r, index < trained))] += times
    return counts


def _longest_path(rounds: Sequence[Round], stages: PipelineStages, costs: Costs) -> float:
    """A time that a micro-batch takes at least if it has all ranks for itself.

    Its forwards wait for features of the pass before, and on each stage for the round before. From the end of the last
    loss on its backwards wait in the same way, in reverse.
    """
    trained, sources, times = num_trained(rounds), feature_sources(rounds), _Times(stages, costs)
    on_stage, done = [0.0] * stages.num_stages, dict[int, float]()
    end = 0.0
    for index, r in enumerate(rounds[:trained]):
        end = max((done[i] for i in sources[index]), default=0.0)
        for s, time in times.of(r, Direction.FORWARD):
            end = on_stage[s] = max(end, on_stage[s]) + time
            if s == stages.last_core:
                done[index] = end
    if stages.split_head and trained:
        end += sum(times.head(rounds[trained - 1]))
    on_stage, wanted = [0.0] * stages.num_stages, dict[int, float]()
    for index, r in reversed(list(enumerate(rounds[:trained]))):
        back = end if index == trained - 1 else 0.0
        for s, time in reversed(times.of(r, Direction.BACKWARD)):
            if s == stages.last_core:
                back = max(back, wanted.get(index, 0.0))
            back = on_stage[s] = max(back, on_stage[s]) + time
        for i in sources[index]:
            wanted[i] = max(wanted.get(i, 0.0), back)
    return max(on_stage)


class _Times:
    """The times of rounds on the stages that they visit."""

    def __init__(self, stages: PipelineStages, costs: Costs) -> None:
        self._stages, self._costs = stages, costs
        self._known: dict[tuple[range, int, bool, Direction], list[tuple[int, float]]] = {}

    def of(self, r: Round, direction: Direction) -> list[tuple[int, float]]:
        """(stage, time), in the order of the forward."""
        key = (self._stages.layers_of(r), len(r.rows) * r.length, r.loss, direction)
        if key not in self._known:
            visited = self._stages.visited(r)
            self._known[key] = [(s, self._costs.time(r, self._stages, s, direction)) for s in visited]
        return self._known[key]

    def head(self, r: Round) -> list[float]:
        """The tasks of a shared head that wait for each other: those of other stages, then those of the last one."""
        last = self._stages.num_stages - 1
        each = [self._costs.time(r, self._stages, last, d) for d in (Direction.HEAD_FORWARD, Direction.HEAD_BACKWARD)]
        return each * 2


def _with_counts(plans: Sequence[Sequence[Round]]) -> list[tuple[tuple[Round, ...], int]]:
    """The plans with their counts. Micro-batches mostly share one plan, which is known by its identity."""
    counts = Counter(map(id, plans))
    known = {id(rounds): tuple(rounds) for rounds in plans}
    return [(known[key], times) for key, times in counts.items()]

"""Runs the ranks' lists in simulated time: how long a step takes, what waits, how much is kept and sent.

It knows the lists alone, nothing of the graph they were made from: a check of the schedule, and its forecast.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Backward, Compute, Forward, Receive, Schedule, Send
from sleeptrain.parallel.pipeline.task_costs import Costs

TensorMapping = tuple[int, int]  # (from, to)


class ScheduleError(Exception):
    """The ranks' lists do not fit each other; a defect of the schedule."""


@dataclass(frozen=True)
class Span:
    """A task on a rank from `start` to `end`."""

    rank: int
    task: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What became of a step. Times are in the unit of the costs.

    busy, peak_live_rounds, peak_waiting: of each rank, the time it works; the most rounds whose forward has begun and
    whose backward has not ended; the most messages that a receive was posted for and no task has read yet. link_bytes:
    bytes sent from one rank to another.
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    finish: float
    busy: tuple[float, ...]
    peak_live_rounds: tuple[int, ...]
    peak_waiting: tuple[int, ...]
    link_bytes: dict[TensorMapping, int]

    @property
    def bubble(self) -> float:
        """Idle time over work: by what share the step is longer than ranks that always work would need."""
        work = sum(self.busy)
        return self.finish * len(self.busy) / work - 1 if work else 0.0


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    bytes_per_token: int = 0,
    *,
    blocking_receives: bool = False,
    rendezvous_sends: bool = False,
) -> Simulation:
    """Runs every rank's list in its order.

    bytes_per_token: of a row's features at one position. By default sends and receives return at once and a task waits
    for the messages it reads. blocking_receives: a receive returns when its message is there. rendezvous_sends: a send
    returns when its receive is posted; both: as in NCCL, whose messages of a pair follow each other in one stream.
    Raises ScheduleError on a deadlock, and where sends and receives do not match or a message is never read.
    """
    execution = _Execution(schedule, costs or Costs(), blocking_receives, rendezvous_sends)
    execution.run()
    busy = [0.0] * len(schedule.ranks)
    for span in execution.spans:
        busy[span.rank] += span.end - span.start
    return Simulation(
        schedule,
        tuple(execution.spans),
        max((span.end for span in execution.spans), default=0.0),
        tuple(busy),
        tuple(execution.peak_live),
        tuple(execution.peak_waiting),
        {link: sum(_bytes(schedule, m, bytes_per_token) for m, _ in sent) for link, sent in execution.sent.items()},
    )


class _Execution:
    """Where every rank stands. sent, posted: by link, in order, each message with the time its side was there."""

    def __init__(self, schedule: Schedule, costs: Costs, blocking_receives: bool, rendezvous_sends: bool):
        num_ranks = len(schedule.ranks)
        self.schedule, self.costs = schedule, costs
        self.blocking_receives, self.rendezvous_sends = blocking_receives, rendezvous_sends
        self.place, self.clock = [0] * num_ranks, [0.0] * num_ranks
        self.sent: dict[TensorMapping, list[tuple[Message, float]]] = defaultdict(list)
        self.posted: dict[TensorMapping, list[tuple[Message, float]]] = defaultdict(list)
        self.num_returned: dict[TensorMapping, int] = defaultdict(int)
        self.unread: list[dict[Compute, list[tuple[TensorMapping, int]]]] = [{} for _ in range(num_ranks)]
        self.spans: list[Span] = []
        self.trained = [{a for a in actions if isinstance(a, Backward)} for actions in schedule.ranks]
        self.live, self.peak_live, self.peak_waiting = [0] * num_ranks, [0] * num_ranks, [0] * num_ranks

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank in range(len(self.place)):
                while self.place[rank] < len(self.schedule.ranks[rank]) and self._advance(rank):
                    self.place[rank] += 1
                    moved = True
        for rank, actions in enumerate(self.schedule.ranks):
            if self.place[rank] < len(actions):
                raise ScheduleError(f"deadlock: rank {rank} waits forever at {actions[self.place[rank]]}")
            if self.unread[rank]:
                raise ScheduleError(f"rank {rank} receives what no later task reads: {list(self.unread[rank])}")
        for link in self.sent.keys() | self.posted.keys():
            if [m for m, _ in self.sent[link]] != [m for m, _ in self.posted[link]]:
                raise ScheduleError(f"rank {link[1]} does not receive what rank {link[0]} sends it, in that order")

    def _advance(self, rank: int) -> bool:
        """Does a rank's next action, if what it waits for is there."""
        match self.schedule.ranks[rank][self.place[rank]]:
            case Send(peer, message):
                return self._send(rank, peer, message)
            case Receive(peer, message):
                return self._receive(rank, peer, message)
            case task:
                return self._compute(rank, task)

    def _send(self, rank: int, peer: int, message: Message) -> bool:
        link = (rank, peer)
        index = len(self.sent[link])
        if self.rendezvous_sends:
            if len(self.posted[link]) <= index:
                return False
            self.clock[rank] = max(self.clock[rank], self.posted[link][index][1])
        self.sent[link].append((message, self.clock[rank]))
        return True

    def _receive(self, rank: int, peer: int, message: Message) -> bool:
        link = (peer, rank)
        index = self.num_returned[link]
        if len(self.posted[link]) == index:
            self.posted[link].append((message, self.clock[rank]))
        if self.blocking_receives:
            if len(self.sent[link]) <= index:
                return False
            self.clock[rank] = max(self.clock[rank], self._arrival(link, index))
        self.num_returned[link] += 1
        reader = Forward if message.kind == Kind.FEATURES else Backward
        self.unread[rank].setdefault(reader(message.seq, message.reader), []).append((link, index))
        self.peak_waiting[rank] = max(self.peak_waiting[rank], sum(map(len, self.unread[rank].values())))
        return True

    def _compute(self, rank: int, task: Compute) -> bool:
        inputs = self.unread[rank].get(task, [])
        if any(len(self.sent[link]) <= index for link, index in inputs):
            return False
        start = max([self.clock[rank], *(self._arrival(*each) for each in inputs)])
        self.unread[rank].pop(task, None)
        r = self.schedule.plans[task.seq][task.round]
        self.clock[rank] = start + self.costs.time(r, self.schedule.stages, rank, isinstance(task, Backward))
        self.spans.append(Span(rank, task, start, self.clock[rank]))
        if isinstance(task, Backward):
            self.live[rank] -= 1
        elif Backward(task.seq, task.round) in self.trained[rank]:
            self.live[rank] += 1
            self.peak_live[rank] = max(self.peak_live[rank], self.live[rank])
        return True

    def _arrival(self, link: TensorMapping, index: int) -> float:
        return self.sent[link][index][1] + self.costs.message


def _bytes(schedule: Schedule, message: Message, bytes_per_token: int) -> int:
    """Only the rows that both rounds have are sent."""
    source, reader = (schedule.plans[message.seq][index] for index in (message.source, message.reader))
    return len(set(source.rows) & set(reader.rows)) * (source.stop - source.start) * bytes_per_token

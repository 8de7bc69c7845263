"""Runs the ranks' lists in simulated time: the time of a step, its bubble, live rounds, messages and bytes sent.

It reads only the lists, not the graph they were made from, so it checks the schedule as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from sleeptrain.parallel.pipeline.graph import AnyMessage, Direction, HeadMessage, Kind, Message
from sleeptrain.parallel.pipeline.schedule import (
    ACTIONS,
    DIRECTIONS,
    Backward,
    Compute,
    Receive,
    Schedule,
    Send,
)
from sleeptrain.parallel.pipeline.task_costs import Costs, TaskTimes

Link = tuple[int, int]  # (from, to)
Reader = tuple[Direction, int, int]  # a task of a rank: direction, micro-batch, round
READERS: dict[Kind, Direction] = {
    Kind.FEATURES: Direction.FORWARD,
    Kind.GRADIENT: Direction.BACKWARD,
    Kind.HEAD_INPUT: Direction.HEAD_FORWARD,
    Kind.STATISTICS: Direction.HEAD_FORWARD,
    Kind.LOG_SUMS: Direction.HEAD_BACKWARD,
    Kind.HEAD_GRADIENT: Direction.HEAD_BACKWARD,
}


class ScheduleError(Exception):
    """The ranks' lists do not fit each other: a bug in the schedule."""


@dataclass(frozen=True)
class Span:
    """A task on a rank from `start` to `end`."""

    rank: int
    task: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A simulated step. Times are in the unit of the costs; tuples have an entry for each rank.

    spans: the tasks with their times.
    finish: the end of the last task.
    busy: the time that the rank works.
    peak_live_rounds: the most rounds whose forward has begun and whose backward has not ended.
    peak_waiting: the most messages whose receive is posted and that no task has read yet.
    link_bytes: bytes sent, by (sender, receiver).
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    finish: float
    busy: tuple[float, ...]
    peak_live_rounds: tuple[int, ...]
    peak_waiting: tuple[int, ...]
    link_bytes: dict[Link, int]

    @property
    def bubble(self) -> float:
        """Idle time divided by work: the share by which the step is longer than without idle time."""
        work = sum(self.busy)
        return self.finish * len(self.busy) / work - 1 if work else 0.0


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    bytes_per_token: int = 0,
    *,
    head_bytes: Callable[[HeadMessage], int] = lambda _: 0,
    blocking_receives: bool = False,
    rendezvous_sends: bool = False,
    pair_streams: bool = False,
) -> Simulation:
    """Run every rank's list in its order.

    By default sends and receives return at once, and a task waits for the messages that it reads.
    bytes_per_token: bytes of the features of one token. head_bytes: bytes of a message about the head.
    blocking_receives: a receive returns when its message has arrived.
    rendezvous_sends: a send returns when its receive is posted.
    pair_streams: sends and receives return at once, and those between two ranks run one after the other, each when both
    ranks have come to it: NCCL with a communicator, and so a stream, for each pair. Without the other two options.
    Raises ScheduleError on a deadlock, if sends and receives do not match, and if a message is never read.
    """
    execution = _Execution(schedule, costs or Costs(), blocking_receives, rendezvous_sends, pair_streams)
    execution.run()
    busy = [0.0] * len(schedule.ranks)
    for span in execution.spans:
        busy[span.rank] += span.end - span.start
    num_bytes = _message_bytes(schedule, bytes_per_token)

    def size(message: AnyMessage) -> int:
        return head_bytes(message) if isinstance(message, HeadMessage) else num_bytes(message)

    return Simulation(
        schedule,
        tuple(execution.spans),
        max((span.end for span in execution.spans), default=0.0),
        tuple(busy),
        tuple(execution.peak_live),
        tuple(execution.peak_waiting),
        {link: sum(size(m) for m, _ in sent) for link, sent in execution.sent.items()},
    )


class _Execution:
    """The state of a simulation.

    place: the index of each rank's next action. clock: each rank's time.
    sent, posted: by link and in order, each message with the time of its send or of its posted receive.
    unread, waiting: of each rank, the messages whose receive is posted, by the task that reads them, and their number.
    streams: by two ranks, what runs between them; None: every message is on its way from its send on.
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, blocking_receives: bool, rendezvous_sends: bool, pair_streams: bool
    ):
        num_ranks = len(schedule.ranks)
        self.schedule, self.costs = schedule, costs
        self.times = TaskTimes(schedule.plans, schedule.stages, costs)
        self.blocking_receives, self.rendezvous_sends = blocking_receives, rendezvous_sends
        self.place, self.clock = [0] * num_ranks, [0.0] * num_ranks
        self.sent: dict[Link, list[tuple[AnyMessage, float]]] = defaultdict(list)
        self.posted: dict[Link, list[tuple[AnyMessage, float]]] = defaultdict(list)
        self.streams: dict[frozenset[int], _PairStream] | None = defaultdict(_PairStream) if pair_streams else None
        self.num_returned: dict[Link, int] = defaultdict(int)
        self.unread: list[dict[Reader, list[tuple[Link, int]]]] = [{} for _ in range(num_ranks)]
        self.waiting = [0] * num_ranks
        self.spans: list[Span] = []
        self.trained = [
            {(a.micro_batch, a.round) for a in actions if isinstance(a, Backward)} for actions in schedule.ranks
        ]
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
                tasks = [ACTIONS[direction](*task) for direction, *task in self.unread[rank]]
                raise ScheduleError(f"rank {rank} receives what no later task reads: {tasks}")
        for link in self.sent.keys() | self.posted.keys():
            if [m for m, _ in self.sent[link]] != [m for m, _ in self.posted[link]]:
                raise ScheduleError(f"rank {link[1]} does not receive what rank {link[0]} sends it, in that order")

    def _advance(self, rank: int) -> bool:
        """Run a rank's next action; False if it still has to wait."""
        action = self.schedule.ranks[rank][self.place[rank]]
        if isinstance(action, Send):
            return self._send(rank, action.peer, action.message)
        if isinstance(action, Receive):
            return self._receive(rank, action.peer, action.message)
        return self._compute(rank, action)

    def _send(self, rank: int, peer: int, message: AnyMessage) -> bool:
        link = (rank, peer)
        index = len(self.sent[link])
        if self.rendezvous_sends:
            if len(self.posted[link]) <= index:
                return False
            self.clock[rank] = max(self.clock[rank], self.posted[link][index][1])
        self.sent[link].append((message, self.clock[rank]))
        if self.streams is not None:
            self.streams[frozenset(link)].post(rank, (link, index), self.clock[rank], self.costs.message)
        return True

    def _receive(self, rank: int, peer: int, message: AnyMessage) -> bool:
        link = (peer, rank)
        index = self.num_returned[link]
        if len(self.posted[link]) == index:
            self.posted[link].append((message, self.clock[rank]))
            if self.streams is not None:
                self.streams[frozenset(link)].post(rank, (link, index), self.clock[rank], self.costs.message)
        if self.blocking_receives:
            if (arrival := self._arrival(link, index)) is None:
                return False
            self.clock[rank] = max(self.clock[rank], arrival)
        self.num_returned[link] += 1
        read_in = message.round if isinstance(message, HeadMessage) else message.reader
        reader = (READERS[message.kind], message.micro_batch, read_in)
        self.unread[rank].setdefault(reader, []).append((link, index))
        self.waiting[rank] += 1
        self.peak_waiting[rank] = max(self.peak_waiting[rank], self.waiting[rank])
        return True

    def _compute(self, rank: int, task: Compute) -> bool:
        direction, mb, index = DIRECTIONS[type(task)], task.micro_batch, task.round
        start, messages = self.clock[rank], self.unread[rank].get((direction, mb, index), ())
        for each in messages:
            if (arrival := self._arrival(*each)) is None:
                return False
            start = max(start, arrival)
        if messages:
            self.waiting[rank] -= len(messages)
            del self.unread[rank][direction, mb, index]
        self.clock[rank] = start + self.times.of(direction, mb, index, rank)
        self.spans.append(Span(rank, task, start, self.clock[rank]))
        if direction is Direction.BACKWARD:
            self.live[rank] -= 1
        elif direction is Direction.FORWARD and (mb, index) in self.trained[rank]:
            self.live[rank] += 1
            self.peak_live[rank] = max(self.peak_live[rank], self.live[rank])
        return True

    def _arrival(self, link: Link, index: int) -> float | None:
        """The time at which a message arrives; None if that is not known yet."""
        if self.streams is not None:
            return self.streams[frozenset(link)].ends.get((link, index))
        return self.sent[link][index][1] + self.costs.message if index < len(self.sent[link]) else None


class _PairStream:
    """The messages between two ranks, in both directions, which run one after the other.

    ends: the time at which each ends, by (link, index). A message begins when both ranks have posted it.
    """

    def __init__(self) -> None:
        self.ends: dict[tuple[Link, int], float] = {}
        self._posted: dict[int, list[tuple[tuple[Link, int], float]]] = defaultdict(list)
        self._free = 0.0

    def post(self, rank: int, message: tuple[Link, int], time: float, duration: float) -> None:
        """Note that a rank has posted its side. Raises ScheduleError if the other rank has posted another message."""
        self._posted[rank].append((message, time))
        sides = [self._posted[end] for end in message[0]]
        while (index := len(self.ends)) < min(map(len, sides)):
            (one, at_one), (other, at_other) = (side[index] for side in sides)
            if one != other:
                raise ScheduleError(f"ranks {message[0]} run {one} and {other} at the same place of their stream")
            self._free = max(self._free, at_one, at_other) + duration
            self.ends[one] = self._free


def _message_bytes(schedule: Schedule, bytes_per_token: int) -> Callable[[Message], int]:
    """The bytes of a message: only the rows that are in both rounds are sent. Micro-batches mostly share one plan."""
    known: dict[tuple[int, int, int], int] = {}

    def num_bytes(message: Message) -> int:
        plan = schedule.plans[message.micro_batch]
        key = (id(plan), message.source, message.reader)
        if key not in known:
            source, reader = plan[message.source], plan[message.reader]
            known[key] = len(set(source.rows) & set(reader.rows)) * source.length * bytes_per_token
        return known[key]

    return num_bytes

"""Runs the ranks' lists in simulated time: the time of a step, its bubble, live rounds, messages and bytes sent.

It reads only the lists, not the graph they were made from, so it checks the schedule as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from sleeptrain.parallel.pipeline.graph import AnyMessage, HeadMessage, Kind, Message
from sleeptrain.parallel.pipeline.schedule import (
    DIRECTIONS,
    Backward,
    Compute,
    Forward,
    HeadBackward,
    HeadForward,
    Receive,
    Schedule,
    Send,
)
from sleeptrain.parallel.pipeline.task_costs import Costs

Link = tuple[int, int]  # (from, to)
READERS: dict[Kind, type[Compute]] = {
    Kind.FEATURES: Forward,
    Kind.GRADIENT: Backward,
    Kind.HEAD_INPUT: HeadForward,
    Kind.STATISTICS: HeadForward,
    Kind.LOG_SUMS: HeadBackward,
    Kind.HEAD_GRADIENT: HeadBackward,
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

    def size(message: AnyMessage) -> int:
        return head_bytes(message) if isinstance(message, HeadMessage) else _bytes(schedule, message, bytes_per_token)

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
    streams: by two ranks, what runs between them; None: every message is on its way from its send on.
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, blocking_receives: bool, rendezvous_sends: bool, pair_streams: bool
    ):
        num_ranks = len(schedule.ranks)
        self.schedule, self.costs = schedule, costs
        self.blocking_receives, self.rendezvous_sends = blocking_receives, rendezvous_sends
        self.place, self.clock = [0] * num_ranks, [0.0] * num_ranks
        self.sent: dict[Link, list[tuple[AnyMessage, float]]] = defaultdict(list)
        self.posted: dict[Link, list[tuple[AnyMessage, float]]] = defaultdict(list)
        self.streams: dict[frozenset[int], _PairStream] | None = defaultdict(_PairStream) if pair_streams else None
        self.num_returned: dict[Link, int] = defaultdict(int)
        self.unread: list[dict[Compute, list[tuple[Link, int]]]] = [{} for _ in range(num_ranks)]
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
        """Run a rank's next action; False if it still has to wait."""
        match self.schedule.ranks[rank][self.place[rank]]:
            case Send(peer, message):
                return self._send(rank, peer, message)
            case Receive(peer, message):
                return self._receive(rank, peer, message)
            case task:
                return self._compute(rank, task)

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
        reader = READERS[message.kind](message.micro_batch, read_in)
        self.unread[rank].setdefault(reader, []).append((link, index))
        self.peak_waiting[rank] = max(self.peak_waiting[rank], sum(map(len, self.unread[rank].values())))
        return True

    def _compute(self, rank: int, task: Compute) -> bool:
        arrivals = [self._arrival(*each) for each in self.unread[rank].get(task, [])]
        known = [arrival for arrival in arrivals if arrival is not None]
        if len(known) < len(arrivals):
            return False
        start = max([self.clock[rank], *known])
        self.unread[rank].pop(task, None)
        r = self.schedule.plans[task.micro_batch][task.round]
        self.clock[rank] = start + self.costs.time(r, self.schedule.stages, rank, DIRECTIONS[type(task)])
        self.spans.append(Span(rank, task, start, self.clock[rank]))
        if isinstance(task, Backward):
            self.live[rank] -= 1
        elif isinstance(task, Forward) and Backward(task.micro_batch, task.round) in self.trained[rank]:
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


def _bytes(schedule: Schedule, message: Message, bytes_per_token: int) -> int:
    """Bytes of a message: only the rows that are in both rounds are sent."""
    source, reader = (schedule.plans[message.micro_batch][index] for index in (message.source, message.reader))
    return len(set(source.rows) & set(reader.rows)) * source.length * bytes_per_token

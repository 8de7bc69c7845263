"""What a pipeline rank holds between its tasks, found by going through its list as the executor does.

Every tensor has a name, so that one that several hold is counted once: what rounds keep for their backward
(`StageMicroBatch`), features for later passes and gradients that are not handed back yet (`StageStep`), messages
(`Mailbox`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Action, Backward, Forward, Receive, Schedule, Send
from sleeptrain.parallel.pipeline.stages import feature_sources, num_trained
from sleeptrain.sleep.rounds import Round

FEATURE_BYTES = 4  # of an element: the residual stream is fp32
Name = tuple[Hashable, ...]


@dataclass(frozen=True)
class Peak:
    """The most bytes of each kind, each at its own worst moment.

    boundary: what live rounds read and the memory of all sequences. messages: arrived or on their way out, and features
    that wait for a later pass.
    """

    boundary: int
    messages: int


@dataclass(frozen=True)
class Memory:
    """state: bytes of each layer's memory for all rows of a sequence. carried: a step begins with it. normed: what is
    fed back is another tensor than the last features."""

    dim: int
    state: Sequence[int]
    num_rows: int
    carried: bool
    normed: bool


def peak_held(plan: Schedule, rank: int, memory: Memory) -> Peak:
    """Of one rank over a step."""
    holdings = _Holdings(plan, rank, memory)
    boundary, messages = holdings.bytes()
    for action in plan.ranks[rank]:
        holdings.act(action)
        now = holdings.bytes()
        boundary, messages = max(boundary, now[0]), max(messages, now[1])
    return Peak(boundary, messages)


class _Counter:
    """Bytes of named tensors with several holders."""

    def __init__(self, sizes: dict[Name, int]):
        self.sizes, self.count, self.total = sizes, dict[Name, int](), 0

    def add(self, names: Sequence[Name]) -> None:
        for name in names:
            self.count[name] = self.count.get(name, 0) + 1
            self.total += self.sizes[name] * (self.count[name] == 1)

    def drop(self, names: Sequence[Name]) -> None:
        for name in names:
            self.count[name] -= 1
            if not self.count[name]:
                del self.count[name]
                self.total -= self.sizes[name]


class _Holdings:
    """boundary: held by rounds and sequences. all: by anybody."""

    def __init__(self, plan: Schedule, rank: int, memory: Memory):
        self.plan, self.stages, self.rank, self.memory = plan, plan.stages, rank, memory
        self.layers = range(*self.stages.bounds[rank : rank + 2])
        self.sources = [feature_sources(rounds) for rounds in plan.plans]
        self.trained = [num_trained(rounds) for rounds in plan.plans]
        self.sizes: dict[Name, int] = {}
        self.boundary, self.all = _Counter(self.sizes), _Counter(self.sizes)
        self.state: dict[int, dict[int, Name]] = {}
        self.at_start: dict[int, tuple[int, list[Name]]] = {}
        self.kept: dict[tuple[int, int], list[Name]] = {}
        self.left: dict[int, dict[int, list[Name]]] = {}
        self.tops: dict[tuple[int, int], tuple[Name, Name, Name]] = {}
        for seq in range(len(plan.plans)):
            first = {i: self._name("S", seq, i, -1, size=memory.state[i]) for i in self.layers if memory.carried}
            self.state[seq] = first
            self._hold(list(first.values()))

    def bytes(self) -> tuple[int, int]:
        return self.boundary.total, self.all.total - self.boundary.total

    def act(self, action: Action) -> None:
        match action:
            case Forward(seq, index):
                self._forward(seq, index)
            case Backward(seq, index):
                self._backward(seq, index)
            case Send(_, message):
                self.all.drop([self._source(message)])
            case Receive(_, message):
                self.all.add([self._name("received", message, size=self._features(self._shape_of(message)))])

    def _forward(self, seq: int, index: int) -> None:
        r = self.plan.plans[seq][index]
        here = self.left.setdefault(seq, {})
        for old in [i for i in here if self.plan.plans[seq][i].window != r.window]:
            self.all.drop(here.pop(old))
        states = list(self.state[seq].values())
        if seq not in self.at_start or self.at_start[seq][0] != r.window:
            if seq in self.at_start:
                self._release(self.at_start[seq][1])
            self.at_start[seq] = (r.window, states)
            self._hold(states)
        entry = self._entry(seq, index)
        if index < self.trained[seq]:
            self.kept[seq, index] = [*entry, *states, *self.at_start[seq][1]]
            self._hold(self.kept[seq, index])
        self.all.drop([name for name in entry if name[0] == "received"])
        self._leave(seq, index, entry)
        self._renew_state(seq, index)

    def _entry(self, seq: int, index: int) -> list[Name]:
        """The tensors that a round reads here; nothing where tokens are embedded."""
        r, stages = self.plan.plans[seq][index], self.stages
        if self.rank != stages.visited(r).start:
            return [("received", Message(Kind.FEATURES, seq, index, index))]
        if r.is_wake:
            return []
        if not r.feeds_back:
            return [self.tops[seq, i][1] for i in self._wakes(seq, index)]
        if stages.first_core != stages.last_core:
            return [("received", Message(Kind.FEATURES, seq, i, index)) for i in self.sources[seq][index]]
        return [self.tops[seq, i][2] for i in self.sources[seq][index]]

    def _leave(self, seq: int, index: int, entry: Sequence[Name]) -> None:
        """Features for the next stage and for later passes: what they read, what the core left, what comes last."""
        r, (first, last) = self.plan.plans[seq][index], self.stages.core
        layers = self.stages.layers_of(r)
        own = range(max(layers.start, self.layers.start), min(layers.stop, self.layers.stop))
        ends = r.state_only and own.stop == layers.stop

        def tensor(kind: str) -> Name:
            return self._name(kind, seq, index, size=self._features(r))

        top: Name = ("none",) if ends else tensor("top")
        core_input: Name = ("none",)
        if own.start <= first < own.stop:
            core_input = entry[0] if len(entry) == 1 and own.start == first else tensor("core input")
        core_output: Name = ("none",)
        if own.start < last <= own.stop and not (ends and last == own.stop):
            core_output = top if last == own.stop and not self.memory.normed else tensor("core output")
        self.tops[seq, index] = (top, core_input, core_output)
        kept = [name for name in dict.fromkeys((top, core_input, core_output)) if name != ("none",)]
        for name in kept:
            self.sizes.setdefault(name, self._features(r))
        self.left[seq][index] = kept
        self.all.add(kept)
        if self.rank + 1 in self.stages.visited(r):
            self.all.add([top])
        if self.stages.first_core != self.stages.last_core and self.rank == self.stages.last_core:
            self.all.add([core_output for sources in self.sources[seq] if index in sources])

    def _renew_state(self, seq: int, index: int) -> None:
        """Rounds of some rows make all layers' memory anew, for all rows."""
        r, state = self.plan.plans[seq][index], self.state[seq]
        written = [i for i in self.stages.layers_of(r) if i in self.layers and self.memory.state[i]]
        renewed = {*written, *(state if len(r.rows) < self.memory.num_rows else ())}
        after = state | {i: self._name("S", seq, i, index, size=self.memory.state[i]) for i in renewed}
        self._hold(list(after.values()))
        self._release(list(state.values()))
        self.state[seq] = after

    def _backward(self, seq: int, index: int) -> None:
        r = self.plan.plans[seq][index]
        self._release(self.kept.pop((seq, index)))
        if self.rank + 1 in self.stages.visited(r):
            self.all.drop([("received", Message(Kind.GRADIENT, seq, index, index))])
        ring = self.stages.first_core != self.stages.last_core
        if ring and self.rank == self.stages.last_core:
            readers = [i for i, sources in enumerate(self.sources[seq]) if index in sources and i < self.trained[seq]]
            self.all.drop([("received", Message(Kind.GRADIENT, seq, reader, index)) for reader in readers])
        self.all.drop([name for name in [("gradient", seq, index)] if name in self.all.count])
        begins = self.rank == self.stages.visited(r).start
        if not begins:
            self.all.add([self._name("gradient out", seq, index, index, size=self._features(r))])
        elif r.feeds_back and ring:
            for source in self.sources[seq][index]:
                size = self._features(self.plan.plans[seq][source])
                self.all.add([self._name("gradient out", seq, index, source, size=size)])
        elif not r.is_wake:
            for source in self.sources[seq][index] if r.feeds_back else self._wakes(seq, index):
                name = self._name("gradient", seq, source, size=self._features(self.plan.plans[seq][source]))
                self.all.add([name] if name not in self.all.count else [])

    def _wakes(self, seq: int, index: int) -> list[int]:
        plan, r = self.plan.plans[seq], self.plan.plans[seq][index]
        same = (i for i in range(index) if plan[i].is_wake and plan[i].window == r.window)
        return [i for i in same if set(plan[i].rows) & set(r.rows)]

    def _source(self, message: Message) -> Name:
        """The tensor that a message sends."""
        if message.kind is Kind.GRADIENT:
            return ("gradient out", message.seq, message.source, message.reader)
        top, _, core_output = self.tops[message.seq, message.source]
        return top if message.source == message.reader else core_output

    def _shape_of(self, message: Message) -> Round:
        index = message.source if message.kind is Kind.FEATURES else message.reader
        return self.plan.plans[message.seq][index]

    def _features(self, r: Round) -> int:
        return len(r.rows) * (r.stop - r.start) * self.memory.dim * FEATURE_BYTES

    def _name(self, *name: Hashable, size: int) -> Name:
        self.sizes[name] = size
        return name

    def _hold(self, names: Sequence[Name]) -> None:
        self.boundary.add(names)
        self.all.add(names)

    def _release(self, names: Sequence[Name]) -> None:
        self.boundary.drop(names)
        self.all.drop(names)

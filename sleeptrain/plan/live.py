"""What a pipeline rank holds between its tasks, found by going through its list as the executor does.

Every tensor has a name, so that one that several hold is counted once: what rounds keep for their backward
(`StageMicroBatch`), features for later passes and gradients that are not handed back yet (`StageStep`), messages
(`Mailbox`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sleeptrain.parallel.pipeline.feature_flow import FeatureFlow, Held, Output
from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Action, Backward, Forward, Receive, Schedule, Send
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
        self.flow = FeatureFlow(plan, rank)
        self.sizes: dict[Name, int] = {}
        self.boundary, self.all = _Counter(self.sizes), _Counter(self.sizes)
        self.state: dict[int, dict[int, Name]] = {}
        self.at_start: dict[int, tuple[int, list[Name]]] = {}
        self.saved: dict[tuple[int, int], list[Name]] = {}
        self.outputs: dict[int, dict[int, list[Name]]] = {}
        self.tensors: dict[tuple[int, int], dict[str, Name]] = {}
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
                self.all.drop([self._sent(message)])
            case Receive(_, message):
                self.all.add([self._name("received", message, size=self._features(self.flow.shape_of(message)))])

    def _forward(self, seq: int, index: int) -> None:
        r = self.plan.plans[seq][index]
        outputs = self.outputs.setdefault(seq, {})
        for expired in self.flow.expired(seq, index, outputs):
            self.all.drop(outputs.pop(expired))
        states = list(self.state[seq].values())
        if seq not in self.at_start or self.at_start[seq][0] != r.window:
            if seq in self.at_start:
                self._release(self.at_start[seq][1])
            self.at_start[seq] = (r.window, states)
            self._hold(states)
        entry = [self._input(seq, place) for _, place in self.flow.reads(seq, index)]
        if self.flow.is_trained(seq, index):
            self.saved[seq, index] = [*entry, *states, *self.at_start[seq][1]]
            self._hold(self.saved[seq, index])
        self.all.drop([name for name in entry if name[0] == "received"])
        self._leave(seq, index, entry)
        self._renew_state(seq, index)

    def _input(self, seq: int, place: Message | Held) -> Name:
        """The tensor that a round reads from there."""
        return self.tensors[seq, place.round_index][place.output] if isinstance(place, Held) else ("received", place)

    def _leave(self, seq: int, index: int, entry: Sequence[Name]) -> None:
        """Features for the next stage and for later passes: what they read, what the core left, what comes last."""
        r, (first, last) = self.plan.plans[seq][index], self.stages.core
        layers = self.stages.layers_of(r)
        own = range(max(layers.start, self.layers.start), min(layers.stop, self.layers.stop))
        ends = r.state_only and own.stop == layers.stop

        def tensor(kind: str) -> Name:
            return self._name(kind, seq, index, size=self._features(r))

        tensors: dict[str, Name] = {}
        if not ends:
            tensors["top_RLD"] = tensor("top")
        if own.start <= first < own.stop:
            tensors["core_input_RLD"] = entry[0] if len(entry) == 1 and own.start == first else tensor("core input")
        if own.start < last <= own.stop and not (ends and last == own.stop):
            is_top = last == own.stop and not self.memory.normed
            tensors["core_output_RLD"] = tensors["top_RLD"] if is_top else tensor("core output")
        self.tensors[seq, index] = tensors
        self.outputs[seq][index] = list(dict.fromkeys(tensors.values()))
        self.all.add(self.outputs[seq][index])
        self.all.add([tensors[output] for output, _ in self.flow.passes_on(seq, index)])

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
        self._release(self.saved.pop((seq, index)))
        self.all.drop([("received", message) for _, message in self.flow.gradients_in(seq, index)])
        self.all.drop([name for name in [("gradient", seq, index)] if name in self.all.count])
        for place in self.flow.gradients_out(seq, index):
            if isinstance(place, Held):
                size = self._features(self.plan.plans[seq][place.round_index])
                name = self._name("gradient", seq, place.round_index, size=size)
                self.all.add([name] if name not in self.all.count else [])
            else:
                self.all.add([self._name("gradient out", place, size=self._features(self.flow.shape_of(place)))])

    def _sent(self, message: Message) -> Name:
        """The tensor that a message sends."""
        if message.kind is Kind.GRADIENT:
            return ("gradient out", message)
        output: Output = "top_RLD" if message.source == message.reader else "core_output_RLD"
        return self.tensors[message.seq, message.source][output]

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

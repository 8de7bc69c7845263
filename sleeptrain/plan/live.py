"""The tensors that a pipeline rank holds between its tasks, from its list of actions in the executor's order.

The holders are: rounds that save inputs for their backward (`StageMicroBatch`), parts of a shared head that do so
(`HeadMicroBatch`), features for later passes and gradients for earlier rounds (`StageStep`), and messages (`Mailbox`).
Every tensor has a name, so that a tensor with several holders counts once. Micro-batches share no tensor. So the count
follows one micro-batch at a time, and only one of those whose rounds and actions are alike, which most are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sleeptrain.parallel.pipeline.feature_flow import FeatureFlow, Held, Output
from sleeptrain.parallel.pipeline.graph import AnyMessage, HeadMessage, Kind, Message
from sleeptrain.parallel.pipeline.schedule import (
    Action,
    Backward,
    Forward,
    HeadBackward,
    HeadForward,
    Receive,
    Schedule,
    Send,
)
from sleeptrain.plan.shared_head import SharedHead
from sleeptrain.sleep.rounds import Round

Name = tuple[Hashable, ...]


@dataclass(frozen=True)
class Peak:
    """The most bytes of each kind; the two peaks may be at different times.

    boundary: the saved inputs of live rounds, what parts of a shared head keep, and the memory of all micro-batches.
    messages: messages that have arrived or are being sent, and features that wait for a later pass.
    """

    boundary: int
    messages: int


@dataclass(frozen=True)
class Memory:
    """Sizes for the count.

    feature: bytes of a token's features between blocks.
    state: bytes of each layer's memory for all rows of a micro-batch.
    num_rows: rows of a micro-batch.
    carried: a step begins with carried memory.
    normed: the fed-back features are normed, so they are another tensor than the last features.
    head: sizes of a head that the stages share; None: the last stage has it.
    """

    feature: int
    state: Sequence[int]
    num_rows: int
    carried: bool
    normed: bool
    head: SharedHead | None = None


def peak_held(plan: Schedule, rank: int, memory: Memory) -> Peak:
    """The peak of one rank over a step."""
    steps = [iter(held) for held in _held_by_micro_batch(plan, rank, memory)]
    boundary, messages = (sum(each) for each in zip((0, 0), *map(next, steps), strict=True))
    most_boundary, most_messages = boundary, messages
    for action in plan.ranks[rank]:
        more_boundary, more_messages = next(steps[_micro_batch(action)])
        boundary, messages = boundary + more_boundary, messages + more_messages
        most_boundary, most_messages = max(most_boundary, boundary), max(most_messages, messages)
    return Peak(most_boundary, most_messages)


def _held_by_micro_batch(plan: Schedule, rank: int, memory: Memory) -> list[list[tuple[int, int]]]:
    """For each micro-batch what the rank holds of it at first, and then what each of its actions adds, of each kind."""
    flow, actions = FeatureFlow(plan, rank), defaultdict[int, list[Action]](list)
    for action in plan.ranks[rank]:
        actions[_micro_batch(action)].append(action)
    known: dict[Hashable, list[tuple[int, int]]] = {}
    held = []
    for mb, rounds in enumerate(plan.plans):
        key = (id(rounds), *map(_unnumbered, actions[mb]))
        if key not in known:
            totals = list(_Holdings(plan, flow, rank, memory, mb).follow(actions[mb]))
            known[key] = [(b - a, d - c) for (a, c), (b, d) in pairwise([(0, 0), *totals])]
        held.append(known[key])
    return held


def _micro_batch(action: Action) -> int:
    return action.message.micro_batch if isinstance(action, Send | Receive) else action.micro_batch


def _unnumbered(action: Action) -> Hashable:
    """The action without the number of its micro-batch."""
    if isinstance(action, Send | Receive):
        kind, _, *ends = action.message
        return type(action), kind, *ends
    return type(action), action.round


class _Counter:
    """Bytes of named tensors, each counted once for any number of holders."""

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
    """The tensors of a micro-batch that a rank holds.

    boundary: the tensors of rounds and of the micro-batches' memory. all: the tensors of all holders.
    """

    def __init__(self, plan: Schedule, flow: FeatureFlow, rank: int, memory: Memory, micro_batch: int):
        self.plan, self.stages, self.rank, self.memory = plan, plan.stages, rank, memory
        self.layers = range(*self.stages.bounds[rank : rank + 2])
        self.flow = flow
        self.sizes: dict[Name, int] = {}
        self.boundary, self.all = _Counter(self.sizes), _Counter(self.sizes)
        self.at_start: dict[int, tuple[int, list[Name]]] = {}
        self.saved: dict[tuple[int, int], list[Name]] = {}
        self.saved_by_head: dict[tuple[int, int], list[Name]] = {}
        self.last = len(plan.ranks) - 1
        self.outputs: dict[int, dict[int, list[Name]]] = {}
        self.tensors: dict[tuple[int, int], dict[str, Name]] = {}
        carried = self.layers if memory.carried else ()
        first = {i: self._name("S", micro_batch, i, -1, size=memory.state[i]) for i in carried}
        self.state = {micro_batch: first}
        self._hold(list(first.values()))

    def follow(self, actions: Sequence[Action]) -> Iterator[tuple[int, int]]:
        """The bytes of each kind before the first action and after each."""
        yield self._bytes()
        for action in actions:
            self._act(action)
            yield self._bytes()

    def _bytes(self) -> tuple[int, int]:
        return self.boundary.total, self.all.total - self.boundary.total

    def _act(self, action: Action) -> None:
        match action:
            case Forward(mb, index):
                self._forward(mb, index)
            case Backward(mb, index):
                self._backward(mb, index)
            case HeadForward(mb, index):
                self._head_forward(mb, index)
            case HeadBackward(mb, index):
                self._head_backward(mb, index)
            case Send(_, message):
                self.all.drop([self._sent(message)])
            case Receive(_, message):
                self.all.add([self._name("received", message, size=self._size(message))])

    def _forward(self, mb: int, index: int) -> None:
        r = self.plan.plans[mb][index]
        outputs = self.outputs.setdefault(mb, {})
        for expired in self.flow.expired(mb, index, outputs):
            self.all.drop(outputs.pop(expired))
        states = list(self.state[mb].values())
        if mb not in self.at_start or self.at_start[mb][0] != r.window:
            if mb in self.at_start:
                self._release(self.at_start[mb][1])
            self.at_start[mb] = (r.window, states)
            self._hold(states)
        entry = [self._input(mb, place) for _, place in self.flow.reads(mb, index)]
        if self.flow.is_trained(mb, index):
            self.saved[mb, index] = [*entry, *states, *self.at_start[mb][1]]
            self._hold(self.saved[mb, index])
        self.all.drop([name for name in entry if name[0] == "received"])
        self._add_outputs(mb, index, entry)
        self._replace_state(mb, index)

    def _input(self, mb: int, place: Message | Held) -> Name:
        """The tensor that a round reads at a place."""
        return self.tensors[mb, place.round_index][place.output] if isinstance(place, Held) else ("received", place)

    def _add_outputs(self, mb: int, index: int, entry: Sequence[Name]) -> None:
        """Add a round's outputs: the features for the next stage, the core's input and the core's output."""
        r, (first, last) = self.plan.plans[mb][index], self.stages.core
        layers = self.stages.layers_of(r)
        local = range(max(layers.start, self.layers.start), min(layers.stop, self.layers.stop))
        ends = r.state_only and local.stop == layers.stop

        def tensor(kind: str) -> Name:
            return self._name(kind, mb, index, size=self._features(r))

        tensors: dict[str, Name] = {}
        if not ends:
            tensors["top_RLD"] = tensor("top")
        if local.start <= first < local.stop:
            tensors["core_input_RLD"] = entry[0] if len(entry) == 1 and local.start == first else tensor("core input")
        if local.start < last <= local.stop and not (ends and last == local.stop):
            is_top = last == local.stop and not self.memory.normed
            tensors["core_output_RLD"] = tensors["top_RLD"] if is_top else tensor("core output")
        self.tensors[mb, index] = tensors
        self.outputs[mb][index] = list(dict.fromkeys(tensors.values()))
        self.all.add(self.outputs[mb][index])
        self.all.add([tensors[output] for output, _ in self.flow.passes_on(mb, index)])
        if r.loss and self.rank == self.last and self.memory.head is not None:
            name = self._name("head input", mb, index, size=self.memory.head.message(Kind.HEAD_INPUT, r))
            self.all.add([name] * (self.last + 1))

    def _replace_state(self, mb: int, index: int) -> None:
        """Replace the memory that a round writes. A round with some of the rows makes new tensors for all layers."""
        r, state = self.plan.plans[mb][index], self.state[mb]
        written = [i for i in self.stages.layers_of(r) if i in self.layers and self.memory.state[i]]
        replaced = {*written, *(state if len(r.rows) < self.memory.num_rows else ())}
        new_state = state | {i: self._name("S", mb, i, index, size=self.memory.state[i]) for i in replaced}
        self._hold(list(new_state.values()))
        self._release(list(state.values()))
        self.state[mb] = new_state

    def _backward(self, mb: int, index: int) -> None:
        self._release(self.saved.pop((mb, index)))
        self.all.drop([("received", message) for _, message in self.flow.gradients_in(mb, index)])
        own = [("gradient", mb, index), ("head gradient", mb, index)]
        self.all.drop([name for name in own if name in self.all.count])
        for place in self.flow.gradients_out(mb, index):
            if isinstance(place, Held):
                size = self._features(self.plan.plans[mb][place.round_index])
                name = self._name("gradient", mb, place.round_index, size=size)
                self.all.add([name] if name not in self.all.count else [])
            else:
                self.all.add([self._name("gradient out", place, size=self._features(self.flow.shape_of(place)))])

    def _head_forward(self, mb: int, index: int) -> None:
        head, r = self._head, self.plan.plans[mb][index]
        logits = self._name("logits", mb, index, size=head.logits(r, self.rank))
        if self.rank < self.last:
            x: Name = ("received", HeadMessage(Kind.HEAD_INPUT, mb, index, self.rank))
            self.all.add([self._out(HeadMessage(Kind.STATISTICS, mb, index, self.rank))])
        else:
            x = ("head input", mb, index)
            self.all.drop([("received", HeadMessage(Kind.STATISTICS, mb, index, part)) for part in range(self.last)])
            log_sums = self._name("log sums", mb, index, size=head.message(Kind.LOG_SUMS, r))
            self.all.add([log_sums] * (self.last + 1))
        self.saved_by_head[mb, index] = [x, logits]
        self._hold([x, logits])
        self.all.drop([x])

    def _head_backward(self, mb: int, index: int) -> None:
        if self.rank < self.last:
            self.all.drop([("received", HeadMessage(Kind.LOG_SUMS, mb, index, self.rank))])
            self.all.add([self._out(HeadMessage(Kind.HEAD_GRADIENT, mb, index, self.rank))])
        else:
            self.all.drop([("log sums", mb, index)])
            self.all.drop([("received", HeadMessage(Kind.HEAD_GRADIENT, mb, index, p)) for p in range(self.last)])
            size = self._head.message(Kind.HEAD_GRADIENT, self.plan.plans[mb][index])
            self.all.add([self._name("head gradient", mb, index, size=size)])
        self._release(self.saved_by_head.pop((mb, index)))

    @property
    def _head(self) -> SharedHead:
        assert self.memory.head is not None, "the schedule shares the head"
        return self.memory.head

    def _out(self, message: HeadMessage) -> Name:
        return self._name("head out", message, size=self._size(message))

    def _size(self, message: AnyMessage) -> int:
        if isinstance(message, HeadMessage):
            return self._head.message(message.kind, self.plan.plans[message.micro_batch][message.round])
        return self._features(self.flow.shape_of(message))

    def _sent(self, message: AnyMessage) -> Name:
        """The tensor that a message sends."""
        if isinstance(message, HeadMessage):
            shared = {Kind.HEAD_INPUT: "head input", Kind.LOG_SUMS: "log sums"}.get(message.kind)
            return ("head out", message) if shared is None else (shared, message.micro_batch, message.round)
        if message.kind is Kind.GRADIENT:
            return ("gradient out", message)
        output: Output = "top_RLD" if message.source == message.reader else "core_output_RLD"
        return self.tensors[message.micro_batch, message.source][output]

    def _features(self, r: Round) -> int:
        return len(r.rows) * r.length * self.memory.feature

    def _name(self, *name: Hashable, size: int) -> Name:
        self.sizes[name] = size
        return name

    def _hold(self, names: Sequence[Name]) -> None:
        self.boundary.add(names)
        self.all.add(names)

    def _release(self, names: Sequence[Name]) -> None:
        self.boundary.drop(names)
        self.all.drop(names)

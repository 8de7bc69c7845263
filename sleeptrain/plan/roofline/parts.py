"""Records of the parts of a round: a block, the embedding, the norm between passes, head and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from sleeptrain.config.schema import ModelConfig, TrainConfig
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.model.head_part import HeadPart
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import Product
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.state import Boundary
from sleeptrain.model.working_copies import is_hooked
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.row_stacks import STACKED, RecordedRows
from sleeptrain.ops.segments import Segments
from sleeptrain.plan.roofline.fusion import compiled, eager
from sleeptrain.plan.roofline.kernel_times import SHARES, Count, count
from sleeptrain.plan.roofline.opaque import CHUNK, Documents
from sleeptrain.plan.roofline.record import LATE_PRODUCT, Call, Recorder
from sleeptrain.sleep.inputs import RoundInputs
from sleeptrain.sleep.loop import LoopSettings, RoundContext, at_targets, summed_loss
from sleeptrain.sleep.precision import DTYPES, in_precision, residual_bytes
from sleeptrain.sleep.rounds import Round

RunsAgain = Callable[[Call], bool]


@dataclass(frozen=True, eq=False)
class Record:
    """The operators of a part. Its counts are kept, for rounds ask for them again and again.

    forward, backward: its calls. results: storages that others read. dispatched: operators that the host called,
    forward and backward. waits: operators for which it waited. copied: elements of the matrices that are cast once a
    step. late: elements of each gradient that is added up when the step ends. compilable: it is a block, which is one
    graph under a compiler.
    """

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    results: frozenset[int]
    dispatched: tuple[int, int]
    waits: int
    copied: int
    late: tuple[int, ...]
    compilable: bool
    _known: dict[tuple[Gpu, bool, int, RunsAgain | None], Count] = field(default_factory=dict, repr=False)

    def count_forward(self, gpu: Gpu, compile: bool, runs: RunsAgain | None = None) -> Count:
        """The forward; with `runs` the forward that runs again, of which only such operators run."""
        return self._once(gpu, compile, 0, runs)

    def count_backward(self, gpu: Gpu, compile: bool) -> Count:
        return self._once(gpu, compile, 1, None)

    @property
    def late_products(self) -> float:
        """Products of kept rows, each as its share of a product of all rows that are multiplied together."""
        return sum(call.kernels for call in self.backward if call.name == LATE_PRODUCT)

    def _once(self, gpu: Gpu, compile: bool, half: int, runs: RunsAgain | None) -> Count:
        key = (gpu, compile, half, runs)
        if key not in self._known:
            calls, others = (self.backward, ()) if half else (self.forward, self.backward)
            self._known[key] = self._count([c for c in calls if runs is None or runs(c)], others, gpu, compile, half)
        return self._known[key]

    def _count(self, calls: Sequence[Call], others: Sequence[Call], gpu: Gpu, compile: bool, half: int) -> Count:
        waits = 0 if half else self.waits
        if not (compile and self.compilable):
            return count(eager(calls), gpu, self.dispatched[half] * SHARES.call, waits)
        kernels = compiled(calls, self.results | {u.storage for c in others for u in c.reads})
        return count(kernels, gpu, sum(k.kernels for k in kernels) * SHARES.launch, waits)


@dataclass(frozen=True, eq=False)
class LongRecord:
    """A part that does the same with one piece of its tokens after the other; all but some pieces are not recorded.

    short, longer: the part with few pieces, and with one piece more. more: pieces that the part has beyond `short`.
    """

    short: Record
    longer: Record
    more: int

    @property
    def copied(self) -> int:
        return self.short.copied

    @property
    def late(self) -> tuple[int, ...]:
        return self.short.late

    @property
    def late_products(self) -> float:
        return self.short.late_products

    def count_forward(self, gpu: Gpu, compile: bool, runs: RunsAgain | None = None) -> Count:
        return self._extended(
            self.short.count_forward(gpu, compile, runs), self.longer.count_forward(gpu, compile, runs)
        )

    def count_backward(self, gpu: Gpu, compile: bool) -> Count:
        return self._extended(self.short.count_backward(gpu, compile), self.longer.count_backward(gpu, compile))

    def _extended(self, short: Count, longer: Count) -> Count:
        return short * (1 - self.more) + longer * self.more


AnyRecord = Record | LongRecord


@dataclass(frozen=True)
class Part:
    """What a record is made under.

    model: the model of one tensor rank. train: the run's settings. inputs: of the round, on the CPU.
    stacked: rows of kept products that are multiplied together; 0: each product is added at once.
    """

    model: ModelConfig
    train: TrainConfig
    round: Round
    inputs: RoundInputs
    stacked: int = STACKED

    def block(self, layer: int, boundary: Boundary, state_only: bool, pairs: int) -> Record:
        """A block that starts from a state. pairs: of tokens that attend, in all rows."""
        model = replace(
            self.model, layers=[self.model.layers[layer]], mixer_only=[0] if layer in self.model.mixer_only else []
        )
        segments = self.inputs.layout.segments
        documents = Documents(pairs, None if segments is None else chunks(segments))
        with self._faked(model) as (hybrid, inputs):
            block, x = hybrid.blocks[0], self._features()
            with torch.no_grad():
                state = tree_map(_leaf, block(x, None, inputs.layout, boundary, state_only)[1])
            run = partial(block, x, state, inputs.layout, boundary, state_only)
            recorder = Recorder(documents=documents, rows_at_once=self.stacked)
            with nullcontext() if self.stacked else RecordedRows(None).recording():
                return _recorded(recorder, hybrid, run, (x, state), _copied(block), compilable=True)

    def embedding(self) -> Record:
        with self._faked(_ends(self.model)) as (hybrid, inputs):
            return _recorded(Recorder(), hybrid, partial(hybrid.embed, inputs.tokens_RL), (), 0)

    def fed_back(self) -> Record:
        with self._faked(_ends(self.model)) as (hybrid, _):
            x = self._features()
            return _recorded(Recorder(), hybrid, partial(hybrid.fed_back, x), (x,), 0)

    def head(self, keep: bool, num_targets: int | None = None) -> Record:
        """The last norm, the head and the loss. keep: it keeps its logits. num_targets: the first ones; None: all."""
        with self._faked(_ends(self.model)) as (hybrid, inputs):
            x, inputs = self._at_head(inputs, num_targets)
            context = RoundContext(hybrid, LoopSettings((0, 1)))

            def run() -> torch.Tensor:
                return summed_loss(context, at_targets(x, inputs), self.round, inputs, keep)

            copied = _copied(hybrid) - _copied(hybrid.blocks)
            return _recorded(Recorder(head=True), hybrid, run, (x,), copied)

    def head_part(self, part: VocabularyPart, keep: bool, num_targets: int | None = None) -> Record:
        """The products and the statistics of one of the stages that share the head. The arguments: as in `head`."""
        with self._faked(_ends(self.model), part) as (hybrid, inputs):
            x, inputs = self._at_head(inputs, num_targets)
            x_ND = hybrid.head_input(at_targets(x, inputs)).detach().requires_grad_()
            head = HeadPart(hybrid)

            def run() -> torch.Tensor:
                with torch.no_grad():
                    statistics_2N, kept = head.statistics(x_ND, inputs.targets_N, keep)
                return head.objective(x_ND, inputs.targets_N, statistics_2N[0], kept)

            return _recorded(Recorder(head=True), hybrid, run, (x_ND,), _copied(hybrid))

    def head_ends(self, num_stages: int) -> Record:
        """What the last stage does for a head that stages share: the norm, and sums of what the parts send it."""
        with self._faked(_ends(self.model), VocabularyPart(0, num_stages)) as (hybrid, inputs):
            x, inputs = self._at_head(inputs, None)
            statistics = [torch.zeros(2, len(inputs.targets_N)) for _ in range(num_stages)]
            gradients = [torch.zeros_like(hybrid.head_input(at_targets(x, inputs))) for _ in range(num_stages)]

            def run() -> torch.Tensor:
                with torch.no_grad():
                    hybrid.join_statistics(statistics)
                    for gradient in gradients[1:]:
                        gradients[0] += gradient
                return hybrid.head_input(at_targets(x, inputs))

            return _recorded(Recorder(head=True), hybrid, run, (x,), 0)

    def _at_head(self, inputs: RoundInputs, num_targets: int | None) -> tuple[torch.Tensor, RoundInputs]:
        """The features that the head reads, and the inputs with the first targets."""
        if num_targets is None:
            return self._features(), inputs
        cut, index = replace(inputs, targets_N=inputs.targets_N[:num_targets]), inputs.target_index_N
        if index is not None:
            return self._features(), replace(cut, target_index_N=index[:num_targets])
        return self._features()[:1, :1].detach().expand(1, num_targets, -1).contiguous().requires_grad_(), cut

    def _features(self) -> torch.Tensor:
        r = self.round
        dtype = torch.bfloat16 if residual_bytes(self.train) == 2 else DTYPES["fp32"]
        return torch.zeros(len(r.rows), r.length, self.model.dim, dtype=dtype, requires_grad=True)

    @contextmanager
    def _faked(self, model: ModelConfig, part: VocabularyPart | None = None) -> Iterator[tuple[Hybrid, RoundInputs]]:
        """A model on fake tensors, as a GPU runs it in a step's precision, and the round's inputs.

        part: of the head, with the last norm and without blocks; None: the whole model.
        """
        mode = FakeTensorMode()
        inputs = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, self.inputs)
        with mode, as_on_gpu():
            hybrid = Hybrid(model) if part is None else Hybrid(model, range(len(model.layers), len(model.layers)), part)
            with in_precision(self.train, hybrid):
                yield hybrid, inputs


def _ends(model: ModelConfig) -> ModelConfig:
    """A model of one block with the same embedding, norm and head."""
    return replace(model, layers=model.layers[:1], mixer_only=[])


def chunks(segments: Segments) -> int:
    """The chunks of all documents, without those that are padded."""
    return int((-(-segments.cu_seqlens.diff() // CHUNK)).sum())


def _leaf(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros_like(value).requires_grad_(value.is_floating_point())


def _copied(module: torch.nn.Module) -> int:
    copies = [part.working_copy for part in module.modules() if isinstance(part, Product)]
    return sum(copy.numel() for copy in copies if copy is not None)


def _recorded(
    recorder: Recorder, hybrid: Hybrid, run: Callable[[], Any], leaves: Any, copied: int, compilable: bool = False
) -> Record:
    """Record `run` and its backward. leaves: its inputs, whose gradients others read, as those of parameters."""
    late = list[tuple[int, frozenset[int]]]()
    for parameter in hybrid.parameters():
        if is_hooked(parameter):  # the gradients of its uses are added up when the step ends
            parameter.register_hook(lambda g: late.append((g.numel(), recorder.storages([g]))))
        elif parameter.grad is None:  # matrices have one, to which their products add
            parameter.grad = torch.zeros_like(parameter)
    with recorder:
        outputs = [t for t in tree_leaves(run()) if isinstance(t, torch.Tensor)]
    trained = [t for t in outputs if t.requires_grad]
    gradients = [torch.ones_like(t) for t in trained]
    sums = [p.grad for p in hybrid.parameters() if p.grad is not None]
    recorder.begin_backward(sums)
    with recorder:
        torch.autograd.backward(trained, gradients)
    inner = [t.grad for t in tree_leaves(leaves) if isinstance(t, torch.Tensor) and t.grad is not None]
    forward = tuple(c for c in recorder.calls if not c.backward)
    backward = tuple(c for c in recorder.calls if c.backward)
    dispatched = (recorder.dispatched[0], recorder.dispatched[1])
    return Record(
        forward,
        backward,
        recorder.storages([*outputs, *inner, *sums]).union(*(storages for _, storages in late)),
        dispatched,
        len(recorder.waits),
        copied,
        tuple(elements for elements, _ in late),
        compilable,
    )

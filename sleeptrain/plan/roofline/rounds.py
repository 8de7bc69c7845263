"""The work of rounds on a GPU: each distinct part is recorded once and counted as often as the round runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.model.hybrid import Hybrid, keeps_logits, rows_at_once
from sleeptrain.model.linear import computing_in
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.row_stacks import STACKED
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.activations import cuda_graph_bytes
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kernel_times import NOTHING, SHARES, Count, count
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.parts import AnyRecord, LongRecord, Part, Record, RunsAgain
from sleeptrain.plan.roofline.record import Call
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.inputs import RoundInputs, inputs_of_rounds
from sleeptrain.sleep.loop import LoopSettings
from sleeptrain.sleep.precision import DTYPES, product_bytes, residual_bytes
from sleeptrain.sleep.round_layouts import RoundLayouts
from sleeptrain.sleep.rounds import Round, Stretch, round_layers

# Kept by `selective` recomputation: their results are dear to compute. Head and loss are outside of it.
KEPT = frozenset({Kind.PRODUCT, Kind.ATTENTION, Kind.RECURRENCE, Kind.HEAD, Kind.LOSS})

AT_ONCE = 64  # pairs of tensors to which torch's `_foreach_add_` adds in a launch
LATE_CALLS = 5  # of the host for a product of kept rows: slices of both factors, a view, the product
GRAPH_COPIES = 12  # launches: inputs of four dtypes, results of two, gradients of both
SUM_BYTES = 12  # that a sum reads and writes an element
PIECES = 2  # of a loss: the first ones, which are recorded of many


def anything(call: Call) -> bool:
    return True


def all_but_kept(call: Call) -> bool:
    return call.kind not in KEPT


@dataclass(frozen=True)
class Parts:
    """The parts of a round with how often it runs each.

    blocks: the blocks. ends: the embedding, and the norm between passes. loss: the last norm, the head and the loss.
    moved: bytes that CUDA graphs of the round copy in and out, forward and backward.
    """

    blocks: tuple[tuple[AnyRecord, int], ...]
    ends: tuple[tuple[AnyRecord, int], ...]
    loss: tuple[tuple[AnyRecord, int], ...]
    moved: int

    @property
    def all(self) -> tuple[tuple[AnyRecord, int], ...]:
        return self.blocks + self.ends + self.loss

    @property
    def copied(self) -> int:
        """Elements of the matrices that are cast once a step."""
        return sum(record.copied * times for record, times in self.all)

    def forward(self, gpu: Gpu, compile: bool) -> Count:
        return sum((record.count_forward(gpu, compile) * times for record, times in self.all), NOTHING)

    def host_with_graphs(self, gpu: Gpu) -> float:
        """Seconds of the host, forward and backward, if CUDA graphs run all but the loss and products of kept rows."""
        eager = ((r.count_forward(gpu, False) + r.count_backward(gpu, False)) * times for r, times in self.loss)
        late = sum(record.late_products * times for record, times in self.blocks)
        return 2 * SHARES.replay + sum(work.host for work in eager) + late * LATE_CALLS * SHARES.call

    def graph_copies(self, gpu: Gpu) -> Count:
        """The copies of what CUDA graphs of the round read and write."""
        return count([Kernel(Kind.ELEMENTWISE, GRAPH_COPIES, 2 * self.moved)], gpu, 0.0)

    def again(self, gpu: Gpu, compile: bool, runs: RunsAgain, loss: bool = False) -> Count:
        """The forward that runs again. loss: with the loss."""
        records = self.blocks + self.loss if loss else self.blocks
        return sum((record.count_forward(gpu, compile, runs) * times for record, times in records), NOTHING)

    def backward(self, gpu: Gpu, compile: bool) -> Count:
        """The backward, with the round's share of the sums that are left to the step's end."""
        late = [elements for record, times in self.all for elements in record.late * times]
        launches = -(-len(late) // AT_ONCE)
        sums = count([Kernel(Kind.SUM, launches, SUM_BYTES * sum(late))] if late else [], gpu, launches * SHARES.launch)
        return sum((record.count_backward(gpu, compile) * times for record, times in self.all), sums)


class RoundRecords:
    """Records the rounds of one tensor rank, which holds the whole depth of the model."""

    def __init__(self, config: Config, settings: LoopSettings):
        """config: `model.vocab_size` is known."""
        self._model = local_config(config.model, config.parallel.tensor)
        self._train, self._settings = config.train, settings
        self._known: dict[Hashable, AnyRecord] = {}
        self._parts: dict[Hashable, Parts] = {}
        self._inputs: dict[Hashable, RoundInputs] = {}
        self._batches: dict[int, Batch] = {}
        self._layouts: tuple[Batch, bool, RoundLayouts] | None = None

    def inputs(self, batch: Batch, rounds: Sequence[Round], fixed_sizes: bool = False) -> list[RoundInputs]:
        """The inputs of the rounds of a batch as a GPU would get them, on the CPU. fixed_sizes: for CUDA graphs."""
        known = self._layouts
        if known is None or known[0] is not batch or known[1] != fixed_sizes:
            with as_on_gpu(), computing_in(self._empty, DTYPES[self._train.precision]):
                window = self._settings.boundary.sliding_window
                layouts = RoundLayouts(batch, self._empty, window, fixed_sizes=fixed_sizes)
            self._layouts = known = batch, fixed_sizes, layouts
        layouts = known[2]
        return inputs_of_rounds(batch, rounds, layouts, torch.device("cpu"))

    def typical_batch(self, config: Config, rows: int) -> Batch:
        """As the function of that name. config: that of the records, but for the layout."""
        if rows not in self._batches:
            self._batches[rows] = typical_batch(config, rows)
        return self._batches[rows]

    def of_kind(
        self, kind: Hashable, batch: Batch, r: Round, keep: bool, head_parts: int, stacked: int | None = None
    ) -> Parts:
        """As `of`. kind: equal for rounds of all batches that have the same parts. stacked: under CUDA graphs."""
        sized = (kind, stacked is not None)
        if sized not in self._inputs:
            [self._inputs[sized]] = self.inputs(batch, [r], fixed_sizes=stacked is not None)
        key = (kind, keep, head_parts, stacked)
        if key not in self._parts:
            rows = STACKED if stacked is None else stacked
            self._parts[key] = self.of(r, self._inputs[sized], keep, head_parts, rows)
        return self._parts[key]

    @cached_property
    def _empty(self) -> Hybrid:
        """The model without weights, with one block of each kind: layouts depend on the kinds alone."""
        with torch.device("meta"):
            return Hybrid(replace(self._model, layers=list(dict.fromkeys(self._model.layers)), mixer_only=[]))

    def of(
        self, r: Round, inputs: RoundInputs, keep: bool = True, head_parts: int = 1, stacked: int = STACKED
    ) -> Parts:
        """The parts of a round.

        inputs: of the round, on the CPU. keep: its loss keeps the logits. head_parts: stages that share the head.
        stacked: as of `Part`.
        """
        model, part = self._model, Part(self._model, self._train, r, inputs, stacked)
        shapes = tuple(tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in tree_leaves(inputs.layout))
        size = (len(r.rows), r.length)
        blocks: Counter[AnyRecord] = Counter()
        layers = round_layers(r, model.layers, self._settings.core, self._settings.boundary.sliding_window is not None)
        for layer in layers:
            pairs = attending_pairs(r, block_spec(model, layer).reach(size[1]))
            boundary = self._settings.boundary
            if not r.is_wake and layer < self._settings.core[1]:
                boundary = replace(boundary, carry_conv=False)
            state_only = r.state_only and layer == layers[-1]
            key = (*size, *shapes, pairs, model.layers[layer], layer in model.mixer_only, boundary, state_only, stacked)
            blocks[self._once(key, partial(part.block, layer, boundary, state_only, pairs))] += 1
        loss = self._loss(part, size, keep, head_parts) if r.loss else ()
        moved = cuda_graph_bytes(model, r, residual_bytes(self._train))
        return Parts(tuple(blocks.items()), self._ends(part, model, size), loss, moved)

    def _loss(
        self, part: Part, size: tuple[int, int], keep: bool, head_parts: int
    ) -> tuple[tuple[AnyRecord, int], ...]:
        """The loss of all stages. Of parts of the vocabulary the first stands for all, which have as many ids or one
        more.
        """
        num_targets, vocab_size = len(part.inputs.targets_N), part.model.vocab_size
        key, itemsize = ("head", *size, num_targets, keep, head_parts), product_bytes(self._train)
        shared = VocabularyPart(0, head_parts) if head_parts > 1 else None
        ids = vocab_size if shared is None else max(len(shared.rows(vocab_size)), 1)
        keep = keep and keeps_logits(num_targets, ids, itemsize)
        rows = rows_at_once(ids, kernels=shared is None)

        def record(n: int | None = None) -> Record:
            return part.head(keep, n) if shared is None else part.head_part(shared, keep, n)

        head = self._once(key, lambda: in_pieces(record, num_targets, rows))
        if shared is None:
            return ((head, 1),)
        ends = self._once(("head ends", *size, num_targets, head_parts), lambda: part.head_ends(head_parts))
        return ((head, head_parts), (ends, 1))

    def _ends(self, part: Part, model: ModelConfig, size: tuple[int, int]) -> tuple[tuple[AnyRecord, int], ...]:
        r = part.round
        parts: list[tuple[tuple[Hashable, ...], Callable[[], Record]]] = []
        if r.is_wake or (not r.feeds_back and self._settings.core[0] == 0):
            parts.append((("embedding", *size), part.embedding))
        if model.norm_between_passes and not r.state_only:
            parts.append((("fed back", *size), part.fed_back))
        return tuple((self._once(key, record), 1) for key, record in parts)

    def _once(self, key: Hashable, record: Callable[[], AnyRecord]) -> AnyRecord:
        if key not in self._known:
            self._known[key] = record()
        return self._known[key]


def in_pieces(record: Callable[[int | None], Record], num_targets: int, rows: int) -> AnyRecord:
    """The record of a loss of `num_targets` targets that is computed `rows` at a time.

    record: called with a number of targets; None: all. Of many pieces two or three are recorded.
    """
    more = num_targets // rows - PIECES
    if more < 2:
        return record(None)
    short = num_targets - more * rows
    return LongRecord(record(short), record(short + rows), more)


def attending_pairs(r: Round, reach: int) -> int:
    """Pairs of a token and one that it sees, in all rows of a round, under hard eviction."""
    length = r.length
    rows = r.work if r.work is not None else ((Stretch(length),),) * len(r.rows)
    return sum(_pairs(stretch.tokens, reach) for row in rows for stretch in row)


def _pairs(tokens: int, reach: int) -> int:
    rising = min(tokens, reach)
    return rising * (rising + 1) // 2 + (tokens - rising) * reach

"""The work of rounds on a GPU: each distinct part is recorded once and counted as often as the round runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.row_stacks import STACKED
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.activations import graph_bytes
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kernel_times import NOTHING, SHARES, Count, count
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.parts import Part, Record, RunsAgain
from sleeptrain.plan.roofline.record import Call
from sleeptrain.sleep.inputs import RoundInputs, inputs_of_rounds
from sleeptrain.sleep.loop import LoopSettings
from sleeptrain.sleep.precision import DTYPES, residual_bytes
from sleeptrain.sleep.round_layouts import RoundLayouts
from sleeptrain.sleep.rounds import Round, Stretch, round_layers

# Kept by `selective` recomputation: their results are dear to compute. Head and loss are outside of it.
KEPT = frozenset({Kind.PRODUCT, Kind.ATTENTION, Kind.RECURRENCE, Kind.HEAD, Kind.LOSS})

AT_ONCE = 64  # pairs of tensors to which torch's `_foreach_add_` adds in a launch
LATE_CALLS = 5  # of the host for a product of kept rows: slices of both factors, a view, the product
GRAPH_COPIES = 12  # launches: inputs of four dtypes, results of two, gradients of both
SUM_BYTES = 12  # that a sum reads and writes an element


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

    blocks: tuple[tuple[Record, int], ...]
    ends: tuple[tuple[Record, int], ...]
    loss: tuple[tuple[Record, int], ...]
    moved: int

    @property
    def all(self) -> tuple[tuple[Record, int], ...]:
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

    def again(self, gpu: Gpu, compile: bool, runs: RunsAgain) -> Count:
        """The forward that runs again, which has no loss."""
        return sum((record.count_forward(gpu, compile, runs) * times for record, times in self.blocks), NOTHING)

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
        self._known: dict[Hashable, Record] = {}
        # By what tells steps apart: the parts of each kind of round (`sleeptrain.plan.roofline.step`).
        self.step_parts: dict[Hashable, dict[Hashable, Parts]] = {}

    def inputs(self, batch: Batch, rounds: Sequence[Round], fixed_sizes: bool = False) -> list[RoundInputs]:
        """The inputs of the rounds of a batch as a GPU would get them, on the CPU. fixed_sizes: for CUDA graphs."""
        with as_on_gpu(), computing_in(self._empty, DTYPES[self._train.precision]):
            window = self._settings.boundary.sliding_window
            layouts = RoundLayouts(batch, self._empty, window, fixed_sizes=fixed_sizes)
        return inputs_of_rounds(batch, rounds, layouts, torch.device("cpu"))

    @cached_property
    def _empty(self) -> Hybrid:
        """The model without weights."""
        with torch.device("meta"):
            return Hybrid(self._model)

    def of(self, r: Round, inputs: RoundInputs, keep: bool = True, stacked: int = STACKED) -> Parts:
        """The parts of a round.

        inputs: of the round, on the CPU. keep: its loss keeps the logits. stacked: as of `Part`.
        """
        model, part = self._model, Part(self._model, self._train, r, inputs, stacked)
        shapes = tuple(tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in tree_leaves(inputs.layout))
        size = (len(r.rows), r.length)
        blocks: Counter[Record] = Counter()
        layers = round_layers(r, model.layers, self._settings.core, self._settings.boundary.sliding_window is not None)
        for layer in layers:
            pairs = attending_pairs(r, block_spec(model, layer).reach(size[1]))
            boundary = self._settings.boundary
            if not r.is_wake and layer < self._settings.core[1]:
                boundary = replace(boundary, carry_conv=False)
            state_only = r.state_only and layer == layers[-1]
            key = (*size, *shapes, pairs, model.layers[layer], layer in model.mixer_only, boundary, state_only, stacked)
            if key not in self._known:
                self._known[key] = part.block(layer, boundary, state_only, pairs)
            blocks[self._known[key]] += 1
        ends, loss = self._ends(part, model, size), self._loss(part, size, keep)
        return Parts(tuple(blocks.items()), ends, loss, graph_bytes(model, r, residual_bytes(self._train)))

    def _loss(self, part: Part, size: tuple[int, int], keep: bool) -> tuple[tuple[Record, int], ...]:
        if not part.round.loss:
            return ()
        key = ("head", *size, len(part.inputs.targets_N), keep)
        if key not in self._known:
            self._known[key] = part.head(keep)
        return ((self._known[key], 1),)

    def _ends(self, part: Part, model: ModelConfig, size: tuple[int, int]) -> tuple[tuple[Record, int], ...]:
        r = part.round
        parts: list[tuple[tuple[Hashable, ...], Callable[[], Record]]] = []
        if r.is_wake or (not r.feeds_back and self._settings.core[0] == 0):
            parts.append((("embedding", *size), part.embedding))
        if model.norm_between_passes and not r.state_only:
            parts.append((("fed back", *size), part.fed_back))
        for key, record in parts:
            if key not in self._known:
                self._known[key] = record()
        return tuple((self._known[key], 1) for key, _ in parts)


def attending_pairs(r: Round, reach: int) -> int:
    """Pairs of a token and one that it sees, in all rows of a round, under hard eviction."""
    length = r.length
    rows = r.work if r.work is not None else ((Stretch(length),),) * len(r.rows)
    return sum(_pairs(stretch.tokens, reach) for row in rows for stretch in row)


def _pairs(tokens: int, reach: int) -> int:
    rising = min(tokens, reach)
    return rising * (rising + 1) // 2 + (tokens - rising) * reach

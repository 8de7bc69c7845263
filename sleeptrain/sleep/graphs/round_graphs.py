"""`train.cuda_graphs`: the layers of rounds as CUDA graphs, so that they cost the host two launches a round.

Rounds with equal keys run alike: at the same place of a micro-batch, with the same shapes and constants. The first one
runs as without graphs, the second is recorded, and from then on what was recorded is replayed. Embedding and blocks are
recorded. Head and loss are not: their number of targets changes with the text, and their logits are large.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.model.working_copies import KeptCopies
from sleeptrain.ops.row_stacks import RecordedRows, RowStacks, fixed_place
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.features import Features
from sleeptrain.sleep.graphs.buffers import FixedGradients, Slot
from sleeptrain.sleep.graphs.capture import Capture, CudaCapture
from sleeptrain.sleep.graphs.recorded_round import RecordedRound, distinct
from sleeptrain.sleep.inputs import RoundInputs
from sleeptrain.sleep.loop import CallLayers, RoundContext
from sleeptrain.sleep.rounds import Round

MOST_ROUNDS = 128  # that are recorded, as two graphs each; a graph of some thousand kernels takes megabytes


class RoundGraphs:
    """Runs the layers of a model's rounds (`LoopSettings.graphs`) inside `step`.

    kept: the copies of weights that graphs read.
    """

    def __init__(self, model: Hybrid, capture: Capture) -> None:
        self._capture, self._gradients = capture, FixedGradients(model)
        self._shape: tuple[int, int] | None = None
        self._told = (0, False)
        self.kept = KeptCopies()
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[Hashable, Slot] = {}
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[RecordedRound, _Layers]] = {}
        self._is_full = False
        self.kept.stacks = RowStacks()

    @contextmanager
    def step(self, shape: StepShape) -> Iterator[None]:
        """Enter it around a step's forwards and backwards.

        Inside, each trained parameter has a gradient, which keeps its place. What was recorded is dropped if weights or
        gradients have moved, other parameters are trained, or windows or rows are others.
        """
        before, self._shape = self._shape, (shape.window, shape.batch)
        if self._gradients.begin() or before != self._shape:
            self._forget()
        with self._capture.running():
            yield

    def take(self) -> str | None:
        """Text that says how many rounds are recorded, if that has changed since the last call."""
        now = len(self._recorded), self._is_full
        if now == self._told:
            return None
        self._told = now
        full = ", the most; all others run without graphs" if self._is_full else ""
        return f"train.cuda_graphs: {now[0]} rounds recorded{full}"

    def __call__(
        self,
        run_layers: CallLayers,
        context: RoundContext,
        r: Round,
        inputs: RoundInputs,
        x_RLD: torch.Tensor | None,
        state: FastWeights,
        boundary_state: FastWeights,
    ) -> tuple[Features, torch.Tensor | None, FastWeights]:
        """The results of `run_layers`."""
        if not _can_record(context, inputs):
            return run_layers(context, r, inputs, x_RLD, state, boundary_state)
        leaves, structure = tree_flatten((inputs.tokens_RL, inputs.layout, x_RLD, state, boundary_state))
        found = self._find(_Layers(run_layers, context, r, structure), leaves)
        if found is None:
            return run_layers(context, r, inputs, x_RLD, state, boundary_state)
        recorded, layers = found
        assert layers.results is not None
        core_input, core_output, x, new_state = tree_unflatten(recorded(leaves), layers.results)
        return Features(r.rows, core_input, core_output), x, new_state

    def _find(self, layers: _Layers, leaves: Sequence[Any]) -> tuple[RecordedRound, _Layers] | None:
        """What is recorded of this round, which may be the time to record it; None: run it without graphs."""
        key = (layers.key, _key_of(leaves))
        if key in self._recorded:
            return self._recorded[key]
        if key not in self._seen:
            self._seen.add(key)
            return None
        if len(self._recorded) >= MOST_ROUNDS:
            self._is_full = True
            return None
        if layers.place not in self._slots:
            self._slots[layers.place] = Slot(self._capture.new_pool(), layers.window)
        slot = self._slots[layers.place]
        self.kept.stacks.multiply()  # the recording writes to the place of rows that may wait
        arguments = (slot, layers.round.length, self._capture, self._gradients.tensors, layers.rows)
        with _naming_the_setting(layers.round):
            self._recorded[key] = RecordedRound(layers, leaves, *arguments), layers
        return self._recorded[key]


@dataclass
class _Layers:
    """`run_layers` of a round, as a function of the leaves of what it reads.

    structure: of the inputs. results: the structure of the results, when it has run.
    """

    run_layers: CallLayers
    context: RoundContext
    round: Round
    structure: TreeSpec
    results: TreeSpec | None = None

    @property
    def window(self) -> int:
        return self.round.stop - self.round.start

    @property
    def place(self) -> Hashable:
        """The place in a micro-batch; no two rounds of one have the same (`plan_rounds`)."""
        r = self.round
        return r.window, r.pass_index, r.loss, r.state_only, self.window

    @property
    def key(self) -> Hashable:
        settings = self.context.settings
        return self.place, self.round.coda, settings.core, settings.boundary, self.structure

    @property
    def rows(self) -> RecordedRows:
        """Where the round keeps rows of products. Those of a window's sleep passes, of equal lengths, adjoin.

        Backwards of other windows come between, or have other lengths; rows that wait are multiplied before.
        """
        r = self.round
        is_alone = r.is_wake or (r.pass_index == 2 and r.coda)
        return RecordedRows(None if is_alone else fixed_place(len(r.rows) * r.length, r.pass_index - 2))

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        tokens_RL, layout, x_RLD, state, boundary_state = tree_unflatten(leaves, self.structure)
        inputs = RoundInputs(tokens_RL, layout, tokens_RL.flatten()[:0])  # layers read no targets
        arguments = (self.context, self.round, inputs, x_RLD, state, boundary_state)
        features, x, new_state = self.run_layers(*arguments)
        leaves, self.results = tree_flatten((features.core_input_RLD, features.output_RLD, x, new_state))
        return leaves


@contextmanager
def _naming_the_setting(r: Round) -> Iterator[None]:
    """Turn an error of a recording into a ConfigError that names `train.cuda_graphs`; too little memory stays that."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"train.cuda_graphs=true, but pass {r.pass_index} over window {r.window} could not be recorded "
            f"({str(error).strip().partition(chr(10))[0]}): a kernel or mixer waits for the device or copies from the "
            "host; train.cuda_graphs=false trains without graphs"
        ) from error


def _can_record(context: RoundContext, inputs: RoundInputs) -> bool:
    """False for a round that is called from inside, has no gradient, or sizes that change with the text."""
    called = context.settings.on_features is not None
    return torch.is_grad_enabled() and not called and inputs.layout.sizes_are_fixed


def _key_of(leaves: Sequence[Any]) -> Hashable:
    """The constants, and of tensors shape, dtype, whether they are trained, and which are the same."""
    tensors, numbers = distinct(leaves)
    constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return constants, tuple(numbers), tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)


def round_graphs(config: Config, model: Hybrid) -> RoundGraphs | None:
    """The graphs of a run, which `layout_check` has passed; None without `train.cuda_graphs`.

    Raises ConfigError if the model is not on a CUDA device.
    """
    if not config.train.cuda_graphs:
        return None
    if model.device.type != "cuda":
        raise ConfigError(
            f"train.cuda_graphs=true needs a CUDA device, and this run is on {model.device.type}; set "
            "train.cuda_graphs=false, or train on a GPU (train.device=cuda)"
        )
    return RoundGraphs(model, CudaCapture())

"""One micro-batch on one pipeline stage: forwards of its rounds, and backwards in reverse order, one at a time.

A forward builds no graph: it saves the round's inputs, and the backward runs the round again. State never leaves its
stage. The backward of a round gets the gradient of its final state from the next round's backward, and passes the
gradient of its initial state to the previous round's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.pipeline.head import HeadMicroBatch, RunBackward
from sleeptrain.sleep.features import gather_rows
from sleeptrain.sleep.inputs import inputs_of_rounds
from sleeptrain.sleep.loop import (
    LoopSettings,
    ReadLogits,
    RoundContext,
    at_targets,
    run_layers,
    summed_loss,
)
from sleeptrain.sleep.round_layouts import RoundLayouts, carried_documents
from sleeptrain.sleep.rounds import Round

Gradients = list[torch.Tensor | None]  # gradients of the floating-point tensors of a state, in order; None is zero


class Part(NamedTuple):
    """Features [R, L, D] of some rows of the micro-batch."""

    rows: tuple[int, ...]
    features_RLD: torch.Tensor


class RoundOutputs(NamedTuple):
    """Outputs of a round on a stage, or their gradients; None for an output that the stage does not make.

    top: features for the next stage, [R, L, D].
    core_input, core_output: features for later passes, [R, L, D].
    head_input: what all stages' parts of the head read, [N, D], where they share it.
    loss: the sum over the round's targets, a scalar.
    """

    top_RLD: torch.Tensor | None = None
    core_input_RLD: torch.Tensor | None = None
    core_output_RLD: torch.Tensor | None = None
    head_input_ND: torch.Tensor | None = None
    loss: torch.Tensor | None = None


@dataclass(frozen=True)
class SavedInputs:
    """Inputs of a round.

    entry: features by rows; empty if the round embeds its tokens.
    state: the state at the start of the round, for all rows.
    boundary_state: the state at the start of the window, for all rows.
    """

    entry: tuple[Part, ...]
    state: FastWeights
    boundary_state: FastWeights


class StageMicroBatch:
    """One micro-batch on this rank's part of the model.

    rounds: its plan; the methods name a round by its index in it.
    state: the memory of its rows, current after each forward.
    divisor: divides each summed loss.
    retained_BC: `retained_documents` of the memory before the first round, if they are known; None: they are read.
    detached_before: rounds whose initial state is detached, where backpropagation ends (`sleep.bptt_windows`).
    loss: the sum over the forwards so far, divided by `divisor`.
    head: the rounds' losses in this rank's part of the head; None where the last stage has the whole head.
    """

    trains = True

    def __init__(
        self,
        model: Hybrid,
        batch: Batch,
        rounds: Sequence[Round],
        state: FastWeights,
        settings: LoopSettings,
        divisor: float,
        detached_before: frozenset[int] = frozenset(),
        read_logits: ReadLogits | None = None,
        retained_BC: torch.Tensor | None = None,
    ) -> None:
        self.rounds = rounds
        self.state = state
        self.loss = torch.zeros((), dtype=torch.float64, device=model.device)
        self._context, self._num_rows = RoundContext(model, settings, read_logits), batch.tokens_BT.shape[0]
        self._divisor, self._detached_before = divisor, detached_before
        if retained_BC is None:
            retained_BC = carried_documents(rounds, state)
        layouts = RoundLayouts(batch, model, settings.boundary.sliding_window, retained_BC)
        self._inputs = inputs_of_rounds(batch, rounds, layouts, model.device)
        self.head: HeadMicroBatch | None = None
        if model.head_part is not None:
            targets = [inputs.targets_N for inputs in self._inputs]
            self.head = HeadMicroBatch(model, rounds, targets, divisor, self.trains, read_logits)
        self._boundary: tuple[int, FastWeights] | None = None  # window, and the state at its start
        self._saved: dict[int, SavedInputs] = {}
        self._state_gradient: Gradients | None = None
        self._boundary_gradient: Gradients | None = None

    def forward(self, index: int, entry: Sequence[Part], trained: bool) -> RoundOutputs:
        """Run a round. If it is `trained`, save its inputs for the backward."""
        r = self.rounds[index]
        if self._boundary is None or self._boundary[0] != r.window:
            self._boundary = (r.window, self.state)
        saved = SavedInputs(tuple(entry), self.state, self._boundary[1])
        with torch.no_grad():
            outputs, self.state = self._run(index, saved)
        if trained:
            self._saved[index] = saved
        if outputs.loss is not None:
            self.add_loss(index, outputs.loss)
        return outputs

    def add_loss(self, index: int, loss: torch.Tensor) -> None:
        """Count the summed loss of a round."""
        self.loss += loss.double() / self._divisor

    def backward(self, index: int, gradients: RoundOutputs, run_backward: RunBackward) -> tuple[Part, ...]:
        """Run a round again, propagate the gradients of its outputs, and return the gradients of its entry.

        run_backward: adds the gradients of a scalar to all leaves.
        """
        saved = self._saved.pop(index)
        entry = tuple(Part(part.rows, _leaf(part.features_RLD)) for part in saved.entry)
        state = _leaves(saved.state)
        begins_window = saved.state is saved.boundary_state
        boundary = state if begins_window else _leaves(saved.boundary_state)
        outputs, after = self._run(index, SavedInputs(entry, state, boundary))
        pairs = list(zip(outputs[:4], gradients[:4], strict=True))
        pairs += zip(_floating(after), self._state_gradient or [None] * len(_floating(after)), strict=True)
        parts = [(output * gradient).sum() for output, gradient in pairs if output is not None and gradient is not None]
        if outputs.loss is not None:
            parts.append(outputs.loss / self._divisor)
        if parts:
            run_backward(torch.stack([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]).sum())
        self._store_state_gradient(index, state, boundary, begins_window)
        return tuple(Part(part.rows, _gradient(part.features_RLD)) for part in entry)

    def _run(self, index: int, saved: SavedInputs) -> tuple[RoundOutputs, FastWeights]:
        """Run the round on this part of the model; `saved` and the returned state hold all rows."""
        model, r, inputs = self._context.model, self.rounds[index], self._inputs[index]
        state, boundary = saved.state, saved.boundary_state
        if inputs.rows_R is not None:
            state, boundary = state.rows(inputs.rows_R), boundary.rows(inputs.rows_R)
        x = gather_rows(saved.entry, r.rows, inputs) if saved.entry else None
        features, top, after = run_layers(self._context, r, inputs, x, state, boundary)
        if inputs.rows_R is not None:
            after = saved.state.put_rows(inputs.rows_R, after, self._num_rows)
        ends = model.layers.stop == model.num_layers
        loss = head_input = None
        if r.loss and ends and top is not None:
            x_ND = at_targets(top, inputs)
            if self.head is None:
                loss = summed_loss(self._context, x_ND, r, inputs)
            else:
                head_input = model.head_input(x_ND)
        return RoundOutputs(top, features.core_input_RLD, features.output_RLD, head_input, loss), after

    def _store_state_gradient(self, index: int, state: FastWeights, boundary: FastWeights, begins_window: bool) -> None:
        """Store the gradient of the round's initial state: it is the gradient of the previous round's final state."""
        if index in self._detached_before:
            self._state_gradient = self._boundary_gradient = None
            return
        gradient: Gradients = [leaf.grad for leaf in _floating(state)]
        if not begins_window:
            boundary_gradient: Gradients = [leaf.grad for leaf in _floating(boundary)]
            self._boundary_gradient = _sum(boundary_gradient, self._boundary_gradient)
        elif self._boundary_gradient is not None:
            gradient, self._boundary_gradient = _sum(gradient, self._boundary_gradient), None
        self._state_gradient = gradient


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a leaf of a new graph; an integer tensor is returned as it is."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _leaves(state: FastWeights) -> FastWeights:
    return tree_map_only(torch.Tensor, _leaf, state)


def _floating(state: FastWeights) -> list[torch.Tensor]:
    return [t for t in tree_leaves(state) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sum(one: Gradients, other: Gradients | None) -> Gradients:
    if other is None:
        return one
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]

"""The layers of one round as two graphs, forward and backward, between tensors that keep their place in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.ops.row_stacks import RecordedRows
from sleeptrain.sleep.graphs.buffers import Slot, copy_, zero_
from sleeptrain.sleep.graphs.capture import Capture

# Called with the leaves of a round's inputs; returns those of its results.
RunLeaves = Callable[[Sequence[Any]], Sequence[Any]]


def distinct(leaves: Sequence[Any]) -> tuple[list[torch.Tensor], list[int | None]]:
    """(the tensors among the leaves, each once; the number of each leaf's tensor, None for a leaf that is none)."""
    numbers: dict[int, int] = {}
    tensors = list[torch.Tensor]()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in numbers:
            numbers[id(leaf)] = len(tensors)
            tensors.append(leaf)
    return tensors, [numbers[id(leaf)] if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


class RecordedRound:
    """A round that is recorded when it is made, as `torch.cuda.make_graphed_callables` records a module.

    A call copies the inputs to where the graph reads them. Its results stay in place until the slot's next round.
    The backward adds the gradients of parameters to `gradients` inside its graph; hooks of parameters do not see them.
    """

    @torch.no_grad()
    def __init__(
        self,
        run: RunLeaves,
        leaves: Sequence[Any],
        slot: Slot,
        length: int,
        capture: Capture,
        gradients: Mapping[nn.Parameter, torch.Tensor],
        rows: RecordedRows,
    ) -> None:
        """leaves: inputs of such a round; what is no tensor is a constant. length: the tokens of the pass.

        rows: that the backward keeps for products of many rows; none may wait now.
        """
        self._rows = rows
        self._run, self._slot, self._length, self._gradients = run, slot, length, gradients
        tensors, self._numbers = distinct(leaves)
        self._constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._trained = [t.requires_grad for t in tensors]
        self._inputs = self._buffers("input", tensors)
        self._between: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        # Of the results: the number of an input, the number of an output, or a constant. Filled by the first forward.
        self._results = list[tuple[str, Any]]()
        self._outputs, self.trained_outputs = list[torch.Tensor](), list[bool]()
        self._output_gradients = list[torch.Tensor]()
        self._input_gradients: list[torch.Tensor | None] | None = None
        self.fill(tensors)
        self._rehearse()
        self._replay_forward = capture.record(self._forward, slot.pool)
        self._replay_backward = capture.record(self._backward, slot.pool)

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves of the results. A result that is an input is this input itself."""
        inputs, _ = distinct(leaves)
        anchor = torch.empty(0, requires_grad=True)  # parameters have gradients even where no input has one
        outputs = _Replay.apply(self, anchor, *inputs)
        kinds = {"input": inputs, "output": outputs}
        return [value if kind == "constant" else kinds[kind][value] for kind, value in self._results]

    def fill(self, inputs: Sequence[torch.Tensor]) -> None:
        copy_(self._inputs, inputs)

    def forward(self) -> tuple[torch.Tensor, ...]:
        """The outputs for what `fill` has copied."""
        self._replay_forward()
        return tuple(output.detach() for output in self._outputs)

    def backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the inputs. gradients: of the outputs; None stands for zeros."""
        of_trained = [g for g, trained in zip(gradients, self.trained_outputs, strict=True) if trained]
        pairs = list(zip(self._output_gradients, of_trained, strict=True))
        zero_(buffer for buffer, g in pairs if g is None)
        copy_([buffer for buffer, g in pairs if g is not None], [g for g in of_trained if g is not None])
        self._rows.take()
        self._replay_backward()
        assert self._input_gradients is not None
        return [None if g is None else g.detach() for g in self._input_gradients]

    def _rehearse(self) -> None:
        """A forward and a backward from zeros, which adds zeros to the gradients of parameters."""
        self._forward()
        zero_(self._output_gradients)
        self._backward()

    def _forward(self) -> None:
        # New tensors at the same places: flash-linear-attention keeps what it computed of the bounds of documents for
        # as long as the tensor is the same, and would not compute it again while it is recorded.
        inputs = [b.detach().requires_grad_(trained) for b, trained in zip(self._inputs, self._trained, strict=True)]
        leaves = zip(self._constants, self._numbers, strict=True)
        with torch.enable_grad():
            results = self._run([constant if number is None else inputs[number] for constant, number in leaves])
        is_input = {id(t) for t in inputs}
        outputs = [t for t in distinct(results)[0] if id(t) not in is_input]
        if not self._results:
            self._plan(results, inputs, outputs)
        copy_(self._outputs, [t.detach() for t in outputs])
        self._between = inputs, outputs

    def _plan(self, results: Sequence[Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        places = {id(t): ("input", i) for i, t in enumerate(inputs)} | {
            id(t): ("output", i) for i, t in enumerate(outputs)
        }
        self._results = [places[id(r)] if isinstance(r, torch.Tensor) else ("constant", r) for r in results]
        self._outputs = self._buffers("output", outputs)
        self.trained_outputs = [t.requires_grad for t in outputs]
        self._output_gradients = self._buffers("output gradient", [t for t in outputs if t.requires_grad])

    def _backward(self) -> None:
        """It frees what the forward has kept, whose memory rounds of other lengths may then take."""
        assert self._between is not None
        (inputs, outputs), self._between = self._between, None
        parameters = list(self._gradients)
        with self._rows.recording():
            found = torch.autograd.grad(
                [t for t in outputs if t.requires_grad],
                [*(t for t in inputs if t.requires_grad), *parameters],
                self._output_gradients,
                allow_unused=True,
            )
        of_trained = iter(found)
        of_inputs = [next(of_trained) if t.requires_grad else None for t in inputs]
        if self._input_gradients is None:
            buffers = enumerate(of_inputs)
            self._input_gradients = [None if g is None else self._buffer("input gradient", i, g) for i, g in buffers]
        copy_(
            [buffer for buffer in self._input_gradients if buffer is not None], [g for g in of_inputs if g is not None]
        )
        uses = [(self._gradients[p], g) for p, g in zip(parameters, of_trained, strict=True) if g is not None]
        if uses:
            torch._foreach_add_([total for total, _ in uses], [g for _, g in uses])

    def _buffers(self, role: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._buffer(role, i, t) for i, t in enumerate(tensors)]

    def _buffer(self, role: str, number: int, like: torch.Tensor) -> torch.Tensor:
        return self._slot.buffer((role, number), like, self._length)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: RecordedRound, _: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recorded.fill(inputs)
        outputs = recorded.forward()
        ctx.recorded = recorded
        ctx.set_materialize_grads(False)
        trained = recorded.trained_outputs
        ctx.mark_non_differentiable(*(t for t, is_trained in zip(outputs, trained, strict=True) if not is_trained))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.recorded.backward(gradients)

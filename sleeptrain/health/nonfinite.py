"""Find where the first non-finite number of a step arises."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights, LayerState
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, loop_settings
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import forward_backward, step_context


class Found(NamedTuple):
    """A place where a number is not finite.

    order: sort key; the smallest of several is the first. what: the place, in words.
    """

    order: tuple[int, ...]
    what: str


class Finder:
    """Checks every block's output in the forward and its gradient in the backward, until `close`.

    `on_round` must be called before each round runs, also before one that runs again in the backward.
    """

    def __init__(self, model: Hybrid) -> None:
        self._model = model
        self._found: list[Found] = []
        self._round: Round | None = None
        self._handles = [
            block.register_forward_hook(lambda _m, _i, output, layer=layer: self._check(layer, output))
            for layer, block in model.blocks.items()
        ]

    def on_round(self, r: Round) -> None:
        self._round = r

    def settings(self, config: Config, shape: StepShape) -> LoopSettings:
        """Settings of the loop under watch: no recomputation, so that each round runs once."""
        settings = loop_settings(config.sleep, shape.window, self._model.num_layers, recompute="none")
        return replace(settings, on_round=self.on_round)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def first(self) -> Found:
        """The first place: in the forward, else in the backward, else in the gradients of parameters."""
        if self._found:
            return min(self._found)
        for name, p in self._model.named_parameters():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                return Found((2,), f"the gradient of {name}")
        return Found((3,), "the head or the loss")

    def _check(self, layer: int, output: tuple[torch.Tensor | None, LayerState]) -> None:
        features, state = output
        r = self._round
        assert r is not None
        place = f"window {r.window + 1}, pass {r.pass_index}, layer {layer}"
        order = (r.window, r.pass_index, int(layer))
        S = getattr(state, "S_BHKV", None)
        for name, tensor in (("features", features), ("fast weights", S)):
            if tensor is None:
                continue
            if not bool(tensor.isfinite().all()):
                self._found.append(Found((0, *order), f"{place} ({name})"))
            if tensor.requires_grad:
                found = Found((1, *(-place for place in order)), f"{place} (gradient of its {name})")
                tensor.register_hook(lambda grad, found=found: self._check_grad(grad, found))

    def _check_grad(self, grad: torch.Tensor | None, found: Found) -> None:
        if grad is not None and not bool(grad.isfinite().all()):
            self._found.append(found)


def locate_nonfinite(model: Hybrid, batch: Batch, shape: StepShape, config: Config, carried: FastWeights | None) -> str:
    """Run a step again under watch and return the place, in words, where the first non-finite number arises.

    A step is a function of its inputs, so the number arises again. Overwrites the gradients of the parameters.
    """
    finder = Finder(model)
    try:
        context = replace(step_context(config, shape, model), settings=finder.settings(config, shape))
        forward_backward(context, model, batch, shape, carried)
    finally:
        finder.close()
    return finder.first().what

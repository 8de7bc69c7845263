"""When a number stops being finite: where it happened first."""

from __future__ import annotations

from dataclasses import replace

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights, LayerState
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import Round
from sleeptrain.train.step import forward_backward


class _Finder:
    """Watches every block's output in the forward and its gradient in the backward; keeps the first bad one of each."""

    def __init__(self, model: Hybrid) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self._round: Round | None = None
        self._handles = [
            block.register_forward_hook(lambda _m, _i, output, layer=layer: self._check(layer, output))
            for layer, block in model.blocks.items()
        ]

    def on_round(self, r: Round) -> None:
        self._round = r

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _check(self, layer: int, output: tuple[torch.Tensor | None, LayerState]) -> None:
        features, state = output
        r = self._round
        assert r is not None
        place = f"window {r.window + 1}, pass {r.pass_index}, layer {layer}"
        S = getattr(state, "S_BHKV", None)
        for name, tensor in (("features", features), ("fast weights", S)):
            if tensor is None:
                continue
            if self.forward is None and not bool(tensor.isfinite().all()):
                self.forward = f"{place} ({name})"
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda grad, what=f"{place} (gradient of its {name})": self._check_grad(grad, what)
                )

    def _check_grad(self, grad: torch.Tensor | None, what: str) -> None:
        if self.backward is None and grad is not None and not bool(grad.isfinite().all()):
            self.backward = what


def locate_nonfinite(model: Hybrid, batch: Batch, shape: StepShape, config: Config, carried: FastWeights | None) -> str:
    """Runs a step again under watch and says where the first non-finite number arose.

    The gradients on the parameters are overwritten. A step is a function of its inputs, so it happens again.
    """
    finder = _Finder(model)
    settings = replace(
        loop_settings(config, shape.window, model.num_layers, recompute="none"), on_round=finder.on_round
    )
    try:
        forward_backward(model, batch, shape, config, carried, settings)
    finally:
        finder.close()
    if finder.forward or finder.backward:
        return str(finder.forward or finder.backward)
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return f"the gradient of {bad[0]}" if bad else "the head or the loss"

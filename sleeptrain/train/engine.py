"""What trains: one interface for the model in one process and for its part in one of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.health.nonfinite import locate_nonfinite
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, ReadLogits, run_rounds
from sleeptrain.sleep.rounds import Round
from sleeptrain.train.optim import Optimizers
from sleeptrain.train.roles import parameter_roles
from sleeptrain.train.step import StepResult, forward_backward
from sleeptrain.watch.whereabouts import Whereabouts


class Engine(Protocol):
    """All processes of a run call each method together. model: the part of it that this process holds."""

    model: Hybrid

    def forward_backward(
        self, batch: Batch, shape: StepShape, carried: FastWeights | None, on_features: OnFeatures | None = None
    ) -> StepResult:
        """The gradient of the mean loss over the step's rows in all replicas; batch, carried: of this one's rows.

        on_features: shown what the core leaves in each round, where it is held (`LoopSettings`).
        """

    def step(self, scale: float) -> float:
        """Clips, and updates at `scale` times the peak rates. Returns the norm; nothing changes if it is not finite."""

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        """Where in a step that is not finite the first such number arose, in words."""

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        """Without training: the summed loss of each window, where the model's end is held; else nothing."""

    def state_dict(self) -> dict[str, Any] | None:
        """Whole weights and optimizer state, {"model", "optim"}, for the process that leads; None for the others."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over what any layout has saved. Raises DataError where it does not fit."""

    def whole_state(self, carried: FastWeights | None) -> FastWeights | None:
        """The memory of all rows and layers, on the CPU, for the process that leads."""

    def own_state(self, whole: FastWeights) -> FastWeights:
        """This process's part of it, on its device."""


class WholeModel:
    """The engine of a single process."""

    def __init__(self, config: Config, device: torch.device, whereabouts: Whereabouts):
        self._config, self._whereabouts = config, whereabouts
        self.model = Hybrid(config.model)
        self.model.init_weights(config.train.seed)
        self.model.to(device)
        self.optim = Optimizers(parameter_roles(self.model), dict(self.model.named_parameters()), config.optim)

    def forward_backward(
        self, batch: Batch, shape: StepShape, carried: FastWeights | None, on_features: OnFeatures | None = None
    ) -> StepResult:
        self.optim.zero_grad()
        return forward_backward(
            self.model, batch, shape, self._config, carried, whereabouts=self._whereabouts, on_features=on_features
        )

    def step(self, scale: float) -> float:
        norm = self.optim.clip(self._config.optim.clip_norm)
        if bool(norm.isfinite()):
            self.optim.step(scale)
        return float(norm)

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        return f"first seen at {locate_nonfinite(self.model, batch, shape, self._config, carried)}"

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        settings = replace(settings, on_round=self._whereabouts.at)
        return run_rounds(self.model, batch, rounds, self.model.empty_state(), settings, read_logits)[0]

    def state_dict(self) -> dict[str, Any] | None:
        return {"model": self.model.state_dict(), "optim": self.optim.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optim.load_state_dict(saved["optim"])

    def whole_state(self, carried: FastWeights | None) -> FastWeights | None:
        return None if carried is None else carried.to("cpu")

    def own_state(self, whole: FastWeights) -> FastWeights:
        return whole.to(self.model.device)


def build_engine(config: Config, world: World, whereabouts: Whereabouts) -> Engine:
    """The engine of this process, which keeps the rounds of its whereabouts current.

    The configuration must know its vocabulary and fit the world's layout.
    """
    if world.size == 1:
        return WholeModel(config, world.device, whereabouts)
    from sleeptrain.parallel.engine import PartOfModel  # one process does not wait for DeepSpeed

    return PartOfModel(config, world, whereabouts)

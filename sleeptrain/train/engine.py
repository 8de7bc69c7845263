"""What trains: one interface for the model in one process and for its part in one of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from sleeptrain.checkpoint.fit import CARRIED, OPTIMIZER, WEIGHTS
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.world import World
from sleeptrain.health.nonfinite import locate_nonfinite
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.optim.freezing import with_rates
from sleeptrain.optim.optimizers import Optimizers
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, ReadLogits
from sleeptrain.sleep.precision import run_rounds_in_precision
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from sleeptrain.watch.progress import Progress


class Engine(Protocol):
    """All processes of a run call each method together. model: the part of it that this process holds."""

    model: Hybrid

    def forward_backward(
        self, batch: Batch, shape: StepShape, carried: FastWeights | None, on_features: OnFeatures | None = None
    ) -> StepResult:
        """The gradient of the mean loss over the step's rows in all replicas; batch, carried: of this one's rows.

        on_features: shown what the core leaves in each round, where it is held (`LoopSettings`).
        """

    def freeze(self, stage: int) -> None:
        """Begins a stage of `optim.curriculum`, or 0, that of `optim.frozen`, in which other parts are not trained."""

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        """Clips, and updates at `scale` times the peak rates. Returns the norm; nothing changes if it is not finite.

        accepts: told of a finite norm, says whether the update is made; all processes must say the same.
        """

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        """Where in a step that is not finite the first such number arose, in words."""

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        """Without training, in `train.precision`: each window's summed loss, where the model's end is held."""

    def local_tensors(self, carried: FastWeights | None) -> dict[str, torch.Tensor]:
        """This process's share of a checkpoint: whole tensors on the CPU that no step changes, by name."""

    def load(self, saved: SavedTensors) -> FastWeights | None:
        """Takes weights and optimizer state that fit (`check_resume`), none where a parameter has not been stepped.

        Returns this process's part of the memory.
        """

    def load_weights(self, saved: SavedTensors) -> None:
        """Takes those weights that the checkpoint has."""


class LocalEngine:
    """The engine of a single process."""

    def __init__(self, config: Config, device: torch.device, progress: Progress):
        self._config, self._progress = config, progress
        self.model = Hybrid(config.model)
        self.model.init_weights(config.train.seed)
        self.model.to(device)
        roles = with_rates(parameter_roles(self.model), config.optim)
        self.optim = Optimizers(roles, dict(self.model.named_parameters()), config.optim)

    def forward_backward(
        self, batch: Batch, shape: StepShape, carried: FastWeights | None, on_features: OnFeatures | None = None
    ) -> StepResult:
        self.optim.zero_grad()
        context = step_context(self._config, shape, self.model, self._progress, on_features)
        return forward_backward(context, self.model, batch, shape, carried)

    def freeze(self, stage: int) -> None:
        self.optim.freeze(stage)

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        norm = self.optim.clip(self._config.optim.clip_norm)
        if bool(norm.isfinite()) and (accepts is None or accepts(float(norm))):
            self.optim.step(scale)
        return float(norm)

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        return f"first seen at {locate_nonfinite(self.model, batch, shape, self._config, carried)}"

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        settings = replace(settings, on_round=self._progress.at)
        state = self.model.empty_state()
        return run_rounds_in_precision(self._config, self.model, batch, rounds, state, settings, read_logits)[0]

    def local_tensors(self, carried: FastWeights | None) -> dict[str, torch.Tensor]:
        found = {WEIGHTS + name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        for kind, parameters in self.optim.state_dict().items():
            for name, tensors in parameters.items():
                found |= {f"{OPTIMIZER}{kind}/{name}/{key}": t.to("cpu", copy=True) for key, t in tensors.items()}
        if carried is not None:
            found |= {CARRIED + name: tensor.cpu() for name, tensor in carried.to_state_dict().items()}
        return found

    def load(self, saved: SavedTensors) -> FastWeights | None:
        optim: dict[str, dict[str, dict[str, torch.Tensor]]]
        optim = {kind: {name: {} for name in names} for kind, names in self.optim.state_dict().items()}
        carried: dict[str, torch.Tensor] = {}

        def keep(path: str, tensor: torch.Tensor) -> None:
            kind, *names = path.removeprefix(OPTIMIZER).split("/")
            found = carried if path.startswith(CARRIED) else optim[kind][names[0]]
            found[path.removeprefix(CARRIED) if found is carried else names[1]] = tensor.to(self.model.device)

        self.load_weights(saved)
        saved.read({path: partial(keep, path) for path in saved.forms if path.startswith((OPTIMIZER, CARRIED))})
        self.optim.load_state_dict(optim)
        return FastWeights.from_state_dict(carried, self.model.num_layers) if carried else None

    def load_weights(self, saved: SavedTensors) -> None:
        weights = {WEIGHTS + name: p.detach() for name, p in self.model.named_parameters()}
        saved.read({path: weight.copy_ for path, weight in weights.items() if path in saved.forms})


def build_engine(config: Config, world: World, progress: Progress) -> Engine:
    """The engine of this process, which keeps its progress current.

    The configuration must know its vocabulary and fit the world's layout.
    """
    if world.size == 1:
        return LocalEngine(config, world.device, progress)
    from sleeptrain.parallel.engine import DistributedEngine  # one process does not wait for DeepSpeed

    return DistributedEngine(config, world, progress)

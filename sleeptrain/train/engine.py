"""Training engines: one interface for the full model in a single process and for its part in one of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from sleeptrain.checkpoint.fit import CARRIED, OPTIMIZER, WEIGHTS
from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.world import World
from sleeptrain.health.nonfinite import locate_nonfinite
from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.model.undrawn import undrawn
from sleeptrain.optim.freezing import with_rates
from sleeptrain.optim.optimizers import Optimizers
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs, round_graphs
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, ReadLogits, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.recompute import with_recompute
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import Plans, StepResult, forward_backward, plan_micro_batches, step_context
from sleeptrain.sleep.totals import StepTotals
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped, run_until_stopped
from sleeptrain.train.evaluate import Runner
from sleeptrain.watch.progress import Progress


class Engine(Runner, Protocol):
    """All processes of a run call each method together.

    model: this process's part of the model. graphs: those of `train.cuda_graphs`, or None.
    """

    model: Hybrid
    graphs: RoundGraphs | None

    def forward_backward(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        on_features: OnFeatures | None = None,
        totals: StepTotals | None = None,
        plans: Plans | None = None,
    ) -> StepResult:
        """Compute the gradient of the mean loss over the step's rows in all replicas.

        Returns this process's part of the result; `exchange_results` joins the parts of all processes.
        batch, carried: this replica's rows and their memory. on_features: called with the core's output of each round
        in the processes that hold it (`LoopSettings`). totals: those of this step; None: processes exchange them here.
        plans: those of `plan` for this batch; None: they are made here.
        """

    def plan(self, batch: Batch, shape: StepShape) -> Plans:
        """Make the rounds of each micro-batch of a step, and its schedule, which the engine keeps.

        Another thread may call it while a step runs.
        """

    def freeze(self, stage: int) -> None:
        """Begin a stage of `optim.curriculum`, which sets the frozen parts. Stage 0 has the parts of `optim.frozen`."""

    def recompute(self, mode: str) -> None:
        """Set the recomputation mode of the next steps (`sleeptrain.sleep.recompute.MODES`)."""

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        """Clip, and update at `scale` times the peak rates. Returns the norm; nothing changes if it is not finite.

        accepts: called with a finite norm; the update is made if it returns True. It must return the same value in all
        processes.
        """

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        """Text that names the place of the first non-finite number in a step."""

    def local_tensors(self, carried: FastWeights | None) -> Tensors:
        """This process's share of a checkpoint, by name: views of its tensors, which the next step changes."""

    def load(self, saved: SavedTensors) -> FastWeights | None:
        """Load weights and optimizer state that fit (`check_resume`). A parameter without steps has no state.

        Returns this process's part of the carried memory.
        """

    def load_weights(self, saved: SavedTensors) -> None:
        """Load the weights that the checkpoint has."""


class LocalEngine:
    """The engine of a single process."""

    def __init__(self, config: Config, device: torch.device, progress: Progress):
        self._config, self._progress = config, progress
        with undrawn(device):
            self.model = Hybrid(config.model)
        self.model.init_weights(config.train.seed)
        roles = with_rates(parameter_roles(self.model), config.optim)
        self.optim = Optimizers(roles, dict(self.model.named_parameters()), config.optim)
        self.graphs = round_graphs(config, self.model)
        if config.train.compile:
            compile_blocks(self.model)

    def forward_backward(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        on_features: OnFeatures | None = None,
        totals: StepTotals | None = None,
        plans: Plans | None = None,
    ) -> StepResult:
        self.optim.zero_grad()
        context = step_context(self._config, shape, self.model, self._progress, on_features, graphs=self.graphs)
        return forward_backward(context, self.model, batch, shape, carried, plans=plans)

    def plan(self, batch: Batch, shape: StepShape) -> Plans:
        return plan_micro_batches(batch, shape, self._config)

    def freeze(self, stage: int) -> None:
        self.optim.freeze(stage)

    def recompute(self, mode: str) -> None:
        self._config = with_recompute(self._config, mode)

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
        with in_precision(self._config.train, self.model):
            return run_rounds(self.model, batch, rounds, state, settings, read_logits)[0]

    def until_stopped(self, ruled: RuledRounds) -> Stopped:
        ruled = ruled.reporting(self._progress.at)
        with in_precision(self._config.train, self.model):
            return run_until_stopped(self.model, ruled, self.model.empty_state())

    def local_tensors(self, carried: FastWeights | None) -> Tensors:
        tensors = {WEIGHTS + name: p.detach() for name, p in self.model.named_parameters()}
        for kind, parameters in self.optim.state_dict().items():
            for name, state in parameters.items():
                tensors |= {f"{OPTIMIZER}{kind}/{name}/{key}": tensor for key, tensor in state.items()}
        if carried is not None:
            tensors |= {CARRIED + name: tensor for name, tensor in carried.to_state_dict().items()}
        return tensors

    def load(self, saved: SavedTensors) -> FastWeights | None:
        optim: dict[str, dict[str, dict[str, torch.Tensor]]]
        optim = {kind: {name: {} for name in names} for kind, names in self.optim.state_dict().items()}
        carried: dict[str, torch.Tensor] = {}
        self.load_weights(saved)
        for path in saved.forms:
            if path.startswith(OPTIMIZER):
                kind, name, key = path.removeprefix(OPTIMIZER).split("/")
                optim[kind][name][key] = saved.tensor(path).to(self.model.device)
            elif path.startswith(CARRIED):
                carried[path.removeprefix(CARRIED)] = saved.tensor(path).to(self.model.device)
        self.optim.load_state_dict(optim)
        return FastWeights.from_state_dict(carried, self.model.num_layers) if carried else None

    def load_weights(self, saved: SavedTensors) -> None:
        for name, parameter in self.model.named_parameters():
            if WEIGHTS + name in saved.forms:
                parameter.detach().copy_(saved.tensor(WEIGHTS + name))


def build_engine(config: Config, world: World, progress: Progress) -> Engine:
    """Build the engine of this process, which updates `progress`.

    config: with its vocabulary set, and checked against the world's layout.
    """
    if world.size == 1:
        return LocalEngine(config, world.device, progress)
    from sleeptrain.parallel.engine import DistributedEngine  # a single process need not load DeepSpeed

    return DistributedEngine(config, world, progress)

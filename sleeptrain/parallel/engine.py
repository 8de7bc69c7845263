"""Training of one process's part of the model: data parallel under ZeRO, tensor shards, pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.distributed.memory import least_memory
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.health.nonfinite import Finder
from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.model.undrawn import undrawn
from sleeptrain.optim.freezing import with_rates
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.build import build_model, check_start_memory, draw_weights
from sleeptrain.parallel.carried import load_carried, own_carried
from sleeptrain.parallel.pipeline.evaluation import EvaluationMicroBatch, forwards_of
from sleeptrain.parallel.pipeline.executor import StageStep
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import Backward, Compute, HeadBackward, Schedule, schedule
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.parallel.pipeline.tied import TiedEmbedding
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.parallel.zero.engine import wrap
from sleeptrain.parallel.zero.state import load, load_weights, local_tensors
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import step_flops
from sleeptrain.sleep.graphs.round_graphs import round_graphs
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, ReadLogits, loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision, narrow_parameters
from sleeptrain.sleep.recompute import with_recompute
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import (
    MicroBatch,
    Plans,
    StepResult,
    forward_backward,
    micro_batches,
    plan_micro_batches,
    start_state,
    step_context,
    truncated,
)
from sleeptrain.sleep.totals import StepTotals, step_totals
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped, run_until_stopped
from sleeptrain.watch.progress import Phase, Progress

# Round plans depend on the data. Where every step has another plan, only a few schedules are worth caching.
KEPT_SCHEDULES = 64


class DistributedEngine:
    """The engine of one process of several (see `sleeptrain.train.engine.Engine`)."""

    def __init__(self, config: Config, world: World, progress: Progress):
        self._config, self._world, self._progress = config, world, progress
        mesh = world.mesh
        self._stages = split_stages(config, mesh.pipeline.size)
        layers = range(*self._stages.bounds[mesh.pipeline.rank : mesh.pipeline.rank + 2])
        with torch.device("meta"):
            full_model = Hybrid(config.model)
        if config.parallel.zero == 3:
            check_start_memory(full_model, mesh.tensor.size, least_memory(world), world.is_main)
        with undrawn(world.device):
            self.model = build_model(config.model, mesh, layers, config.parallel.sequence, self._stages.split_head)
        draw_weights(self.model, config.train.seed, mesh.data)
        self._tied = TiedEmbedding(self.model, mesh)
        self._sharding = ModelSharding(config.model, mesh.tensor.size, self.model.head_part)
        local_names = {name for name, _ in self.model.named_parameters()}
        all_roles = with_rates(parameter_roles(full_model), config.optim)
        roles = {name: role for name, role in all_roles.items() if name in local_names}
        shapes = {name: tuple(p.shape) for name, p in full_model.named_parameters() if name in local_names}
        narrow = narrow_parameters(config.train, self.model)
        self._zero = wrap(self.model, roles, config.optim, config.parallel.zero, mesh, self._sharding, shapes, narrow)
        self.graphs = round_graphs(config, self.model)
        if config.train.compile:
            compile_blocks(self.model)
        self._costs = schedule_costs(config)
        self._order = lru_cache(KEPT_SCHEDULES)(self._make_order)

    def forward_backward(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        on_features: OnFeatures | None = None,
        totals: StepTotals | None = None,
        plans: Plans | None = None,
    ) -> StepResult:
        return self._gradient(batch, shape, carried, on_features=on_features, totals=totals, plans=plans)

    def plan(self, batch: Batch, shape: StepShape) -> Plans:
        plans = plan_micro_batches(batch, shape, self._config)
        if self._world.mesh.pipeline.size > 1:
            self._schedule(plans)
        return plans

    def _gradient(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        *,
        finder: Finder | None = None,
        on_features: OnFeatures | None = None,
        totals: StepTotals | None = None,
        plans: Plans | None = None,
    ) -> StepResult:
        """Compute the gradient of the step and return this process's part of the result.

        finder: records the first non-finite number; None to compute without a search. totals, plans: as in
        `forward_backward`.
        """
        plans = self.plan(batch, shape) if plans is None else plans
        self._zero.zero_grad()
        totals = totals or step_totals(self._config, self._world, batch, shape)
        divisor = max(totals.targets, 1)
        run = self._run_pipelined if self._world.mesh.pipeline.size > 1 else self._run_unpipelined
        if self._sums_each_backward(totals):
            return run(batch, shape, carried, divisor, plans, finder, on_features)
        with self._zero.sum_once():
            result = run(batch, shape, carried, divisor, plans, finder, on_features)
            self._complete_gradients()
        return result

    @property
    def _copies(self) -> bool:
        """A wide matrix is cast once a step. Under ZeRO-3 it is here only while it is used, so each use casts it."""
        return self._config.parallel.zero < 3

    def _run_unpipelined(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        divisor: int,
        plans: Plans,
        finder: Finder | None,
        on_features: OnFeatures | None,
    ) -> StepResult:
        graphs = self.graphs if finder is None else None
        context = step_context(self._config, shape, self.model, self._progress, on_features, self._zero, graphs)
        context = replace(context, copies=self._copies)
        if finder is not None:
            context = replace(context, settings=finder.settings(self._config, shape))
        return forward_backward(context, self.model, batch, shape, carried, divisor, plans)

    def _run_pipelined(
        self,
        batch: Batch,
        shape: StepShape,
        carried: FastWeights | None,
        divisor: int,
        plans: Plans,
        finder: Finder | None,
        on_features: OnFeatures | None,
    ) -> StepResult:
        settings = loop_settings(self._config.sleep, shape.window, self.model.num_layers)
        settings = replace(settings, on_features=on_features)
        micros = list(micro_batches(batch, shape, self._config, carried, plans))
        stage_parts = [
            StageMicroBatch(
                self.model,
                m.batch,
                m.rounds,
                start_state(self.model, m, carried),
                settings,
                divisor,
                self._cuts(m),
                retained_BC=m.retained_BC,
            )
            for m in micros
        ]
        on_task = self._report_progress if finder is None else lambda _, r: finder.on_round(r)
        with in_precision(self._config.train, self.model, self._copies):
            self._run_schedule(self._schedule([m.rounds for m in micros]), stage_parts, on_task)
        final_state, num_rows = self.model.empty_state(), batch.tokens_BT.shape[0]
        for m, part in zip(micros, stage_parts, strict=True):
            final_state = final_state.put_rows(m.rows(self._world.device), part.state, num_rows)
        rounds = [r for m in micros for r in m.rounds]
        num_targets = int((batch.targets_BT != IGNORE).sum())
        flops = step_flops(self._config.model, rounds, num_targets, settings.core, settings.boundary.sliding_window)
        return StepResult(float(sum(part.loss for part in stage_parts)), final_state.detach(), len(rounds), flops)

    def _report_progress(self, task: Compute, r: Round) -> None:
        self._progress.at(r, Phase.BACKWARD if isinstance(task, Backward | HeadBackward) else Phase.FORWARD)

    def _run_schedule(
        self, plan: Schedule, stage_parts: Sequence[StageMicroBatch], on_task: Callable[[Compute, Round], None]
    ) -> None:
        pipeline = self._world.mesh.pipeline
        assert pipeline.group is not None
        mailbox = Mailbox(pipeline.group, self.model.residual_dtype or torch.float32, self._world.device)
        step = StageStep(plan, pipeline.rank, stage_parts, mailbox, self._config.model.dim, on_task)
        step.run(self._zero.backward)

    def _schedule(self, plans: Plans) -> Schedule:
        """The schedule of these rounds. Its order is that of whole windows, the same whatever documents a step has.

        `plan` calls it in a thread before the step; the step then finds the order in the cache.
        """
        order = self._order(tuple(tuple(r.whole() for r in rounds) for rounds in plans))
        return replace(order, plans=tuple(tuple(rounds) for rounds in plans))

    def _make_order(self, plans: tuple[tuple[Round, ...], ...]) -> Schedule:
        return schedule(plans, self._stages, self._costs)

    def _cuts(self, micro: MicroBatch) -> frozenset[int]:
        """Indices of the rounds whose initial state is detached (`sleep.bptt_windows`)."""
        stretches = list(truncated(micro.rounds, self._config.sleep.bptt_windows))
        starts = [sum(len(s) for s in stretches[:i]) for i in range(1, len(stretches))]
        return frozenset(starts)

    def _sums_each_backward(self, totals: StepTotals) -> bool:
        """True if each backward sums its gradients over replicas: always under ZeRO-3, under ZeRO-2 where possible.

        All replicas must produce their gradients in the same order. Raises ConfigError under ZeRO-3 if they do not.
        """
        if self._config.parallel.zero == 3 and not totals.alike:
            raise ConfigError(
                "parallel.zero=3 needs replicas with equal rounds, or a target in the first window of each, and "
                "this step has neither; use parallel.zero=1 or 2"
            )
        return totals.alike

    def _complete_gradients(self) -> None:
        """Give a gradient to every parameter, also in a replica without a target, and sum those of tied embeddings."""
        missing = [p for p in self._zero.parameters.values() if p.grad is None]
        if missing:
            # DeepSpeed sums only gradients that a backward has made.
            self._zero.backward(torch.stack([0.0 * p.sum() for p in missing]).sum())
        self._tied.sum_gradients()

    def freeze(self, stage: int) -> None:
        self._zero.freeze(stage)

    def recompute(self, mode: str) -> None:
        self._config = with_recompute(self._config, mode)

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        return self._zero.step(scale, accepts)

    def locate_nonfinite(self, batch: Batch, shape: StepShape, carried: FastWeights | None) -> str:
        finder = Finder(self.model)
        try:
            self._gradient(batch, shape, carried, finder=finder)
        finally:
            finder.close()
        first_seen = self._world.gather(finder.first())
        rank = min(range(len(first_seen)), key=lambda r: first_seen[r])
        return f"first seen on rank {rank} at {first_seen[rank].what}"

    @torch.no_grad()
    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        model, state = self.model, self.model.empty_state()
        settings = replace(settings, on_round=self._progress.at)
        if self._world.mesh.pipeline.size == 1:
            # The result is a tuple, as in training: in a dict at the top level ZeRO-3 requires string keys.
            with in_precision(self._config.train, self.model, self._copies):
                return self._zero.forward(lambda _: run_rounds(model, batch, rounds, state, settings, read_logits))[0]
        micro_batch = EvaluationMicroBatch(model, batch, rounds, state, settings, 1.0, read_logits=read_logits)
        with in_precision(self._config.train, self.model, self._copies):
            forwards = forwards_of(self._schedule([rounds]))
            self._run_schedule(forwards, [micro_batch], lambda _, r: self._progress.at(r))
        return micro_batch.losses

    @torch.no_grad()
    def until_stopped(self, ruled: RuledRounds) -> Stopped:
        model, ruled = self.model, ruled.reporting(self._progress.at)
        with in_precision(self._config.train, self.model, self._copies):
            return self._zero.forward(lambda _: run_until_stopped(model, ruled, model.empty_state()))

    def local_tensors(self, carried: FastWeights | None) -> Tensors:
        memory = own_carried(carried, self._world.mesh, self._sharding, self._world.device)
        return local_tensors(self._zero) | memory

    def load(self, saved: SavedTensors) -> FastWeights | None:
        load(self._zero, saved)
        shard, device = self._world.mesh.tensor.rank, self._world.device
        return load_carried(saved, self._world.part, self.model.layers, self._sharding, shard, device)

    def load_weights(self, saved: SavedTensors) -> None:
        load_weights(self._zero, saved)

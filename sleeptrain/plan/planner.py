"""Counts the steps of layouts of one run. What several layouts share is counted once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sleeptrain.config.schema import Config
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.parallel.pipeline.graph import HeadMessage
from sleeptrain.parallel.pipeline.least_times import least_times
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.simulate import Simulation, simulate
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages, splits_head
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.plan.activations import Activations
from sleeptrain.plan.links import LINK_SHARES, DataTraffic, TensorTraffic, data_traffic, sent_bytes, tensor_traffic
from sleeptrain.plan.live import Peak
from sleeptrain.plan.memory import StageMemory, graph_bytes, stage_memory, stage_peak
from sleeptrain.plan.parameters import WIDE, Held, ModelParameters
from sleeptrain.plan.roofline.kernel_times import SHARES
from sleeptrain.plan.roofline.rounds import RoundRecords
from sleeptrain.plan.roofline.step import StepCount, count_step
from sleeptrain.plan.shared_head import SharedHead
from sleeptrain.plan.speed import Speed, Traffic, Work, forecast, leaves_machine
from sleeptrain.plan.update import newton_schulz_flops
from sleeptrain.plan.workload import Workload, workloads
from sleeptrain.sleep.precision import residual_bytes

T = TypeVar("T")
SCHEDULES = 4  # that are kept, for they are large: those of the curriculum stages of a layout


@dataclass(frozen=True)
class StepPlan:
    """A step of one curriculum stage.

    workload: the rounds of the step.
    recompute: the recomputation mode.
    simulation: of a replica's pipeline schedule.
    memory, tensor, data: one entry for each pipeline stage.
    flops, recompute_flops: FLOPs in all processes.
    pipeline: bytes by (sending stage, receiving stage).
    tied: bytes of the gradient of tied embeddings that the first stage adds up with those of the copies.
    speed: forecast; None without a GPU. efficiency: share of the GPU's peak in it, 0..1; None without a GPU.
    """

    workload: Workload
    recompute: str
    simulation: Simulation
    memory: tuple[StageMemory, ...]
    flops: int
    recompute_flops: int
    tensor: tuple[TensorTraffic, ...]
    data: tuple[DataTraffic, ...]
    tied: int
    speed: Speed | None
    efficiency: float | None

    @property
    def pipeline(self) -> dict[tuple[int, int], int]:
        return self.simulation.link_bytes

    @property
    def live_rounds(self) -> int:
        return max(self.simulation.peak_live_rounds)


class Planner:
    """Plans layouts of one run on one GPU.

    Its methods take configurations that differ in `parallel`, `train.micro_batch` and `sleep.recompute` only, with the
    size of the vocabulary; a workload is of such a configuration. `sleep.recompute` is a mode, but in `workloads`.
    """

    def __init__(self, gpu: Gpu | None, efficiency: float | None):
        """gpu: None: no forecast. efficiency: share of the GPU's peak, 0..1; None: it is counted."""
        self.gpu, self.efficiency = gpu, efficiency
        self._known: dict[Hashable, Any] = {}
        self._schedules: dict[Hashable, tuple[Schedule, Simulation]] = {}

    def stages(self, config: Config) -> PipelineStages:
        pipeline = config.parallel.pipeline
        return self._once(("stages", *_pipeline(config)), lambda: split_stages(config, pipeline))

    def held(self, config: Config) -> list[list[Held]]:
        """The parameters of a process of each pipeline stage."""
        key = ("held", config.parallel.tensor, *_pipeline(config))
        model = self._once(("model",), lambda: ModelParameters(config))
        return self._once(key, lambda: model.stages(config, self.stages(config).bounds))

    def workloads(self, config: Config, replicas: int) -> list[Workload]:
        key = ("workloads", replicas, config.train.micro_batch, config.parallel.token_parts)
        return self._once(key, lambda: workloads(config, replicas))

    def schedule(self, config: Config, workload: Workload) -> tuple[Schedule, Simulation]:
        """The schedule of a replica's step, and its simulation."""

        def make() -> tuple[Schedule, Simulation]:
            costs = schedule_costs(config)
            plan = schedule(workload.plans, self.stages(config), costs)
            feature, head = residual_bytes(config.train) * config.model.dim, SharedHead.of(config, workload)

            def head_bytes(message: HeadMessage) -> int:
                assert head is not None, "only a shared head sends messages"
                return head.message(message.kind, plan.plans[message.micro_batch][message.round])

            return plan, simulate(plan, costs, feature, head_bytes=head_bytes)

        key = ("schedule", *_pipeline(config), *_shape(config, workload))
        if key not in self._schedules:
            if len(self._schedules) == SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = make()
        return self._schedules[key]

    def memory(self, config: Config, workload: Workload, peaks: bool = True) -> tuple[StageMemory, ...]:
        """The memory of the fullest process of each pipeline stage.

        peaks: with what its stages keep between their tasks, for which the schedule is made; else a lower bound.
        """
        kernels, stages = self.gpu is not None, self.stages(config)
        counts = self._once(("counts", config.parallel.tensor), lambda: Activations.of(config, kernels))

        def one(s: int, h: list[Held]) -> StageMemory:
            nothing = None if config.parallel.pipeline == 1 else Peak(0, 0)
            peak = self._peak(config, workload, s) if peaks else nothing
            key = ("graphs", s, config.parallel.zero == 3, *_mode(config, workload))
            graphs = self._once(key, lambda: graph_bytes(counts, config, workload, range(*stages.bounds[s : s + 2])))
            return stage_memory(config, workload, h, stages, s, counts, peak, graphs)

        parallel = config.parallel
        key = ("memory", peaks, workload.replicas, parallel.zero, parallel.shard_replicas, *_mode(config, workload))
        return self._once(key, lambda: tuple(one(s, h) for s, h in enumerate(self.held(config))))

    def fullest(self, config: Config, workload: Workload, peaks: bool = True) -> int:
        """Bytes of the fullest process."""
        return max(m.total for m in self.memory(config, workload, peaks))

    def step(self, config: Config, processes: int, workload: Workload) -> StepPlan:
        forecast = self.gpu is not None
        return StepPlan(
            workload, config.sleep.recompute, self.schedule(config, workload)[1], self.memory(config, workload),
            workload.flops(config), workload.recompute_flops(config), self.tensor(config, workload),
            self.data(config, workload), self._tied(config),
            self.speed(config, processes, workload) if forecast else None,
            self.efficiency_of(config, workload) if forecast else None,
        )  # fmt: skip

    def speed(self, config: Config, processes: int, workload: Workload) -> Speed:
        """The forecast of a step."""
        efficiency = self.efficiency_of(config, workload)
        if config.parallel.pipeline == 1:  # nothing waits
            busy, finish = self._least_times(config, workload)
        else:
            busy, finish = self._times(config, workload)
        return self._speed(config, processes, workload, busy, finish, efficiency)

    def _times(self, config: Config, workload: Workload) -> tuple[list[float], float]:
        """The time that each rank works, and the end of the step, by the schedule."""

        def make() -> tuple[list[float], float]:
            simulation = self.schedule(config, workload)[1]
            return list(simulation.busy), simulation.finish

        return self._once(("times", *_pipeline(config), *_shape(config, workload)), make)

    def least_compute(self, config: Config, processes: int, workload: Workload, counted: bool) -> float:
        """Seconds of work and waiting that the step takes at least.

        counted: at its efficiency; else nothing is recorded: no kernel reaches more of the peak than wide products.
        """
        assert self.gpu is not None
        busy, finish = self._least_times(config, workload)
        named = SHARES.wide_product if self.efficiency is None else self.efficiency
        share = self.efficiency_of(config, workload) if counted else named
        return self._executed(config, processes, workload, busy) / (self.gpu.flops * share) * finish / max(busy)

    def least_seconds(self, config: Config, processes: int, workload: Workload) -> float:
        """Seconds that the step takes at least, links and update included: stages wait as little as they can."""
        busy, finish = self._least_times(config, workload)
        return self._speed(config, processes, workload, busy, finish, self.efficiency_of(config, workload)).seconds

    def host_bound(self, config: Config, workload: Workload) -> bool:
        """True if the host needs longer for its calls than the GPU for its work; False if the efficiency is named."""
        if self.efficiency is not None:
            return False
        work = self.step_count(config, workload).work
        return work.host > work.total

    def efficiency_of(self, config: Config, workload: Workload) -> float:
        """The share of the GPU's peak that the step reaches: named or counted."""
        if self.efficiency is not None:
            return self.efficiency
        assert self.gpu is not None
        return self.step_count(config, workload).efficiency(self.gpu)

    def step_count(self, config: Config, workload: Workload) -> StepCount:
        assert self.gpu is not None
        gpu, tensor = self.gpu, config.parallel.tensor
        of = workload.settings  # of which a record reads the core and the boundary
        records = self._once(("records", tensor, of.core, of.boundary), lambda: RoundRecords(config, of))
        stages, split = _pipeline(config)  # of the stages only a shared head's parts matter
        heads = stages if split else min(stages, 2)
        key = ("count", heads, split, config.sleep.recompute, tensor, *_shape(config, workload))
        return self._once(key, lambda: count_step(config, workload, gpu, config.train.compile, records=records))

    def tensor(self, config: Config, workload: Workload) -> tuple[TensorTraffic, ...]:
        stages, ranks = self.stages(config), range(config.parallel.pipeline)
        key = ("tensor", *_mode(config, workload))
        return self._once(key, lambda: tuple(tensor_traffic(config, workload, stages, s) for s in ranks))

    def data(self, config: Config, workload: Workload) -> tuple[DataTraffic, ...]:
        parallel = config.parallel
        key: tuple[Hashable, ...] = ("data", parallel.zero, workload.replicas, parallel.tensor, *_pipeline(config))
        key = (*key, parallel.shard_replicas)
        if parallel.zero > 1:
            key = (*key, *_mode(config, workload))
        return self._once(key, lambda: tuple(data_traffic(config, workload, h) for h in self.held(config)))

    def _speed(
        self,
        config: Config,
        processes: int,
        workload: Workload,
        busy: Sequence[float],
        finish: float,
        efficiency: float,
    ) -> Speed:
        """busy: the time that each rank works. finish: of the step, in the same unit. efficiency: see `StepPlan`."""
        assert self.gpu is not None
        memory = self.memory(config, workload, peaks=False)
        work = Work(
            flops=self._flops(config, workload)[0],
            executed=self._executed(config, processes, workload, busy),
            bubble=finish / max(busy) - 1,
            orthogonalised=self._newton_schulz(config, config.parallel.state_replicas(workload.replicas)),
            state=max(m.weights + m.master + m.gradients + m.optimizer for m in memory),
            tokens=workload.tokens,
        )  # fmt: skip
        products = SHARES.wide_product if self.efficiency is None else self.efficiency
        return forecast(self.gpu, efficiency, processes, work, self._traffic(config, workload), products)

    def _flops(self, config: Config, workload: Workload) -> tuple[int, int]:
        """Model FLOPs of a step in all processes, without and with pads."""
        key = ("flops", *_shape(config, workload))
        return self._once(key, lambda: (workload.flops(config), workload.executed().flops(config)))

    def _executed(self, config: Config, processes: int, workload: Workload, busy: Sequence[float]) -> float:
        """FLOPs of a process of the busiest stage, recomputation and pads included."""
        again = self._once(("again", *_mode(config, workload)), lambda: workload.executed().recompute_flops(config))
        return (self._flops(config, workload)[1] + again) / processes * max(busy) * len(busy) / sum(busy)

    def _least_times(self, config: Config, workload: Workload) -> tuple[list[float], float]:
        key = ("least", *_pipeline(config), *_shape(config, workload))
        return self._once(key, lambda: least_times(workload.plans, self.stages(config), schedule_costs(config)))

    def _traffic(self, config: Config, workload: Workload) -> Traffic:
        gpu, parallel, replicas = self.gpu, config.parallel, workload.replicas
        assert gpu is not None
        shard = parallel.state_replicas(replicas)
        far = leaves_machine(parallel.tensor, replicas, parallel.pipeline, shard)

        def seconds(link: str, sent: float, passes: float, size: int) -> float:
            return LINK_SHARES.seconds(gpu, sent, passes, size, far[link])

        def data(d: DataTraffic) -> float:
            sent = sent_bytes(d.reduce, shard) + sent_bytes(d.gather, shard) + d.exchange
            others = replicas // shard
            summed = seconds("data", sent_bytes(d.copies, others), d.copies_passes, others)
            return seconds("shard", sent, d.passes, shard) + summed

        tensor = (
            seconds("tensor", sent_bytes(t.total, parallel.tensor), t.passes, parallel.tensor)
            for t in self.tensor(config, workload)
        )
        tied = self._tied(config)
        return Traffic(
            max(tensor), max(map(data, self.data(config, workload))) + seconds("pipeline", tied, bool(tied), 2)
        )

    def _peak(self, config: Config, workload: Workload, stage: int) -> Peak | None:
        key = ("peak", stage, config.parallel.tensor, *_pipeline(config), *_shape(config, workload))
        return self._once(key, lambda: stage_peak(config, workload, self.schedule(config, workload)[0], stage))

    def _newton_schulz(self, config: Config, replicas: int) -> float:
        """FLOPs of Newton-Schulz on the process with the most work."""
        key = ("newton_schulz", replicas, config.parallel.tensor, *_pipeline(config))
        return self._once(key, lambda: max(newton_schulz_flops(config, h, replicas) for h in self.held(config)))

    def _tied(self, config: Config) -> int:
        if not config.model.tie_embeddings or config.parallel.pipeline == 1:
            return 0
        held = self.held(config)
        copies = held[1:] if splits_head(config, config.parallel.pipeline) else held[-1:]
        return WIDE * sum(h.numel for stage in copies for h in stage if h.name == "embedding.weight")

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known


def _shape(config: Config, workload: Workload) -> tuple[Hashable, ...]:
    """What the rounds of a replica's step depend on."""
    return workload.first_token, workload.rows, workload.num_micros, config.parallel.token_parts


def _mode(config: Config, workload: Workload) -> tuple[Hashable, ...]:
    """What the work of a process depends on."""
    return config.sleep.recompute, config.parallel.tensor, *_pipeline(config), *_shape(config, workload)


def _pipeline(config: Config) -> tuple[int, bool]:
    """The number of pipeline stages, and whether they share the head."""
    return config.parallel.pipeline, splits_head(config, config.parallel.pipeline)

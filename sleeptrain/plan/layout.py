"""A configuration laid over processes: everything that `sleeptrain plan` says, found without starting any of them."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tasks.build import build_task
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.parallel.layout_check import check_layout, too_few_sequences
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.simulate import Simulation, simulate
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.links import DataTraffic, TensorTraffic, data_traffic, sent_bytes, tensor_traffic
from sleeptrain.plan.live import FEATURE_BYTES
from sleeptrain.plan.memory import StageMemory, stage_memory
from sleeptrain.plan.parameters import WIDE, Held, count_parameters, held_parameters
from sleeptrain.plan.speed import Speed, Traffic, Work, forecast, leaves_machine
from sleeptrain.plan.update import newton_schulz_flops
from sleeptrain.plan.workload import Workload, workloads


@dataclass(frozen=True)
class StepPlan:
    """A step of one stage of the curriculum. memory, tensor, data: of each pipeline stage.

    simulation: of a replica's schedule. flops, recompute_flops: in all processes. pipeline: bytes that each stage sends
    each other one. tied: bytes of the embeddings' gradient that the first and the last stage add up.
    """

    workload: Workload
    simulation: Simulation
    memory: tuple[StageMemory, ...]
    flops: int
    recompute_flops: int
    tensor: tuple[TensorTraffic, ...]
    data: tuple[DataTraffic, ...]
    tied: int
    speed: Speed | None

    @property
    def pipeline(self) -> dict[tuple[int, int], int]:
        return self.simulation.link_bytes

    @property
    def live_rounds(self) -> int:
        return max(self.simulation.peak_live_rounds)


@dataclass(frozen=True)
class Plan:
    """parameters: all, and those of embeddings and head. held: by a process of each pipeline stage."""

    config: Config
    processes: int
    replicas: int
    bounds: tuple[int, ...]
    parameters: int
    embedding_parameters: int
    held: tuple[tuple[Held, ...], ...]
    steps: tuple[StepPlan, ...]
    gpu: tuple[str, Gpu] | None
    efficiency: float
    warning: str | None

    @property
    def largest(self) -> StepPlan:
        """The stage of the curriculum with the most work in a step."""
        return max(self.steps, key=lambda s: s.flops)


def make_plan(config: Config, processes: int, gpu: tuple[str, Gpu] | None, efficiency: float) -> Plan:
    """Raises ConfigError for a layout that does not fit, and for a vocabulary that neither model nor data tell."""
    replicas = check_layout(config, processes)
    config = with_vocabulary(config, config.model.vocab_size or vocabulary(config))
    stages = split_stages(config, config.parallel.pipeline)
    held = held_parameters(config, stages.bounds)
    costs = schedule_costs(config)
    steps = []
    for workload in workloads(config, replicas):
        made = schedule(workload.plans, stages, costs)
        simulation = simulate(made, costs, FEATURE_BYTES * config.model.dim)
        steps.append(_step_plan(config, processes, workload, made, simulation, held, gpu, efficiency))
    total, embedding = count_parameters(config)
    return Plan(
        config, processes, replicas, stages.bounds, total, embedding, tuple(map(tuple, held)), tuple(steps), gpu,
        efficiency, too_few_sequences(config, replicas),
    )  # fmt: skip


def _step_plan(
    config: Config,
    processes: int,
    workload: Workload,
    made: Schedule,
    simulation: Simulation,
    held: list[list[Held]],
    gpu: tuple[str, Gpu] | None,
    efficiency: float,
) -> StepPlan:
    ranks = range(config.parallel.pipeline)
    memory = tuple(stage_memory(config, workload, held[s], made, s, gpu is not None) for s in ranks)
    tensor = tuple(tensor_traffic(config, workload, made.stages, s) for s in ranks)
    data = tuple(data_traffic(config, workload, held[s]) for s in ranks)
    flops, again = workload.flops(config), workload.recompute_flops(config)
    tied = 0
    if config.model.tie_embeddings and len(ranks) > 1:
        tied = WIDE * next(h.numel for h in held[0] if h.name == "embedding.weight")
    speed = None
    if gpu is not None:
        busiest = max(simulation.busy) * len(ranks) / sum(simulation.busy)
        executed = workload.executed()
        work = Work(
            flops=flops,
            executed=(executed.flops(config) + executed.recompute_flops(config)) / processes * busiest,
            bubble=simulation.finish / max(simulation.busy) - 1,
            orthogonalised=max(newton_schulz_flops(config, h, workload.replicas) for h in held),
            state=max(m.weights + m.master + m.gradients + m.optimizer for m in memory),
            tokens=workload.tokens,
        )
        speed = forecast(gpu[1], efficiency, processes, work, _traffic(config, workload, tensor, data, tied))
    return StepPlan(workload, simulation, memory, flops, again, tensor, data, tied, speed)


def _traffic(
    config: Config,
    workload: Workload,
    tensor: tuple[TensorTraffic, ...],
    data: tuple[DataTraffic, ...],
    tied: int,
) -> Traffic:
    parallel, replicas = config.parallel, workload.replicas
    return Traffic(
        tensor=max(sent_bytes(t.total, parallel.tensor) for t in tensor),
        data=max(sent_bytes(d.reduce, replicas) + sent_bytes(d.gather, replicas) + d.exchange for d in data),
        tied=tied,
        machines=leaves_machine(parallel.tensor, replicas, parallel.pipeline),
    )


def vocabulary(config: Config) -> int:
    """The size that the data tells. Raises ConfigError where it is not there."""
    if config.data.source != "shards":
        return build_task(config.data).vocab_size
    location = config.data.shards.sources[0].train
    try:
        return TokenShards(location).vocab_size
    except DataError as error:
        raise ConfigError(f"model.vocab_size is 0, and the data cannot say it: {error}") from error

"""The plan of a configuration on a number of processes: all numbers of `sleeptrain plan`. Starts no process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tasks.build import build_task
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.distributed.memory import device_memory
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.parallel.layout_check import check_layout, too_few_micro_batches
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.simulate import Simulation, simulate
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.links import DataTraffic, TensorTraffic, data_traffic, sent_bytes, tensor_traffic
from sleeptrain.plan.memory import StageMemory, stage_memory
from sleeptrain.plan.parameters import WIDE, Held, count_parameters, held_parameters
from sleeptrain.plan.recompute import choose
from sleeptrain.plan.roofline.kernel_times import SHARES
from sleeptrain.plan.roofline.step import count_step
from sleeptrain.plan.speed import Speed, Traffic, Work, forecast, leaves_machine
from sleeptrain.plan.update import newton_schulz_flops
from sleeptrain.plan.workload import Workload, workloads
from sleeptrain.sleep.precision import residual_bytes
from sleeptrain.sleep.recompute import AUTO, with_recompute


@dataclass(frozen=True)
class StepPlan:
    """A step of one curriculum stage.

    workload: the rounds of the step.
    recompute: the recomputation mode.
    simulation: of a replica's pipeline schedule.
    memory, tensor, data: one entry for each pipeline stage.
    flops, recompute_flops: FLOPs in all processes.
    pipeline: bytes by (sending stage, receiving stage).
    tied: bytes of the gradient of tied embeddings, which the first and the last stage add up.
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


@dataclass(frozen=True)
class Plan:
    """All numbers of a plan.

    bounds: first layer of each pipeline stage, then the number of layers.
    parameters: of the model. embedding_parameters: of embeddings and head.
    held: for each pipeline stage, the parameters that one of its processes holds.
    steps: one for each curriculum stage.
    gpu: (name, data sheet); None: no forecast.
    efficiency: share of the GPU's peak that was named, 0..1; None: it is counted for each step (`StepPlan.efficiency`).
    memory: bytes of a process within which `sleep.recompute=auto` chose; None: nothing was chosen.
    """

    config: Config
    processes: int
    replicas: int
    bounds: tuple[int, ...]
    parameters: int
    embedding_parameters: int
    held: tuple[tuple[Held, ...], ...]
    steps: tuple[StepPlan, ...]
    gpu: tuple[str, Gpu] | None
    efficiency: float | None
    warning: str | None
    memory: float | None

    @property
    def largest(self) -> StepPlan:
        """The step of the curriculum stage with the most FLOPs."""
        return max(self.steps, key=lambda s: s.flops)


def make_plan(config: Config, processes: int, gpu: tuple[str, Gpu] | None, efficiency: float | None) -> Plan:
    """Plan a run on `processes` processes.

    efficiency: the share of the GPU's peak that the run reaches, 0..1; None: count it, from a record of its operators.
    `sleep.recompute=auto` chooses for the GPU's memory; without `gpu` for the memory of this machine's GPU, or of a
    machine without one for all of its own.
    Raises ConfigError if the layout does not fit, or if neither the model nor the data give the size of the vocabulary.
    """
    replicas = check_layout(config, processes)
    config = with_vocabulary(config, config.model.vocab_size or vocabulary(config))
    stages = split_stages(config, config.parallel.pipeline)
    held = held_parameters(config, stages.bounds)
    costs = schedule_costs(config)
    memory = process_memory(gpu) if config.sleep.recompute == AUTO else None
    steps = []
    for workload in workloads(config, replicas):
        plan = schedule(workload.plans, stages, costs)
        simulation = simulate(plan, costs, residual_bytes(config.train) * config.model.dim)
        mode = choose(config, workload, held, plan, memory or 0, gpu is not None).mode
        steps.append(
            _step_plan(with_recompute(config, mode), processes, workload, plan, simulation, held, gpu, efficiency)
        )
    total, embedding = count_parameters(config)
    return Plan(
        config, processes, replicas, stages.bounds, total, embedding, tuple(map(tuple, held)), tuple(steps), gpu,
        efficiency, too_few_micro_batches(config, replicas), memory,
    )  # fmt: skip


def _step_plan(
    config: Config,
    processes: int,
    workload: Workload,
    plan: Schedule,
    simulation: Simulation,
    held: list[list[Held]],
    gpu: tuple[str, Gpu] | None,
    efficiency: float | None,
) -> StepPlan:
    ranks = range(config.parallel.pipeline)
    memory = tuple(stage_memory(config, workload, held[s], plan, s, gpu is not None) for s in ranks)
    tensor = tuple(tensor_traffic(config, workload, plan.stages, s) for s in ranks)
    data = tuple(data_traffic(config, workload, held[s]) for s in ranks)
    flops, recompute = workload.flops(config), workload.recompute_flops(config)
    tied = 0
    if config.model.tie_embeddings and len(ranks) > 1:
        tied = WIDE * next(h.numel for h in held[0] if h.name == "embedding.weight")
    speed = None
    if gpu is not None:
        products = SHARES.wide_product if efficiency is None else efficiency
        if efficiency is None:
            efficiency = count_step(config, workload, gpu[1], config.train.compile).efficiency(gpu[1])
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
        traffic = _traffic(config, workload, tensor, data, tied)
        speed = forecast(gpu[1], efficiency, processes, work, traffic, products)
    counted = None if gpu is None else efficiency
    return StepPlan(
        workload, config.sleep.recompute, simulation, memory, flops, recompute, tensor, data, tied, speed, counted
    )


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


def process_memory(gpu: tuple[str, Gpu] | None) -> float:
    """Bytes of the GPU; without one of this machine's GPU, or of the machine if it has none."""
    if gpu is not None:
        return gpu[1].memory
    return device_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def vocabulary(config: Config) -> int:
    """The size of the data's vocabulary. Raises ConfigError if the data is not there."""
    if config.data.source != "shards":
        return build_task(config.data).vocab_size
    location = config.data.shards.sources[0].train
    try:
        return TokenShards(location).vocab_size
    except DataError as error:
        raise ConfigError(f"model.vocab_size is 0, and the data does not give it: {error}") from error

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
from sleeptrain.plan.parameters import Held, count_parameters
from sleeptrain.plan.planner import Planner, StepPlan
from sleeptrain.plan.recompute import choose
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.recompute import AUTO, with_recompute


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
    planner = Planner(None if gpu is None else gpu[1], efficiency)
    memory = process_memory(gpu) if config.sleep.recompute == AUTO else None
    steps = [
        planner.step(_with_mode(planner, config, workload, memory or 0), processes, workload)
        for workload in planner.workloads(config, replicas)
    ]
    total, embedding = count_parameters(config)
    return Plan(
        config, processes, replicas, planner.stages(config).bounds, total, embedding,
        tuple(map(tuple, planner.held(config))), tuple(steps), gpu, efficiency,
        too_few_micro_batches(config, replicas), memory,
    )  # fmt: skip


def _with_mode(planner: Planner, config: Config, workload: Workload, memory: float) -> Config:
    return with_recompute(config, choose(config, lambda tried: planner.fullest(tried, workload), memory).mode)


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

"""`sleep.recompute=auto`: for each curriculum stage the first mode that fits the memory of the fullest process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.config.schema import Config
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.memory import stage_memory
from sleeptrain.plan.parameters import Held, held_parameters
from sleeptrain.plan.workload import Workload, workloads
from sleeptrain.sleep.recompute import AUTO, with_recompute

# The share of the memory that a plan may fill: it does not count buffers of kernels and the waste of the allocator.
SHARE = 0.9


@dataclass(frozen=True)
class Choice:
    """The mode of a curriculum stage.

    total: bytes of the fullest process under it, or 0 if the mode was not chosen by memory. fits: within the share.
    """

    mode: str
    total: int = 0
    fits: bool = True


def modes_in_order(config: Config) -> tuple[str, ...]:
    """The modes that the layout allows, from the fastest to the one that takes least memory.

    A pipeline runs whole rounds again in every mode, and inside a round `block` takes least.
    """
    if config.parallel.pipeline > 1:
        return ("none", "selective", "block")
    return ("none", "pass", "window") if config.parallel.zero == 3 else ("none", "selective", "pass", "window")


def choose(
    config: Config, workload: Workload, held: Sequence[Sequence[Held]], plan: Schedule, memory: float, kernels: bool
) -> Choice:
    """The mode of a stage: `sleep.recompute`, or under `auto` the first that fits, and the last if none does.

    held, plan: of all pipeline stages (`stage_memory`). memory: bytes of a process.
    """
    choice = Choice(config.sleep.recompute)
    for mode in modes_in_order(config) if choice.mode == AUTO else ():
        tried = with_recompute(config, mode)
        total = max(stage_memory(tried, workload, h, plan, s, kernels).total for s, h in enumerate(held))
        choice = Choice(mode, total, total <= SHARE * memory)
        if choice.fits:
            break
    return choice


def choose_stages(config: Config, replicas: int, memory: float, kernels: bool) -> list[tuple[int, Choice]]:
    """(tokens seen at its begin, choice) of each curriculum stage that the run reaches. `model.vocab_size` is known."""
    stages, costs = split_stages(config, config.parallel.pipeline), schedule_costs(config)
    held = held_parameters(config, stages.bounds)
    return [
        (work.first_token, choose(config, work, held, schedule(work.plans, stages, costs), memory, kernels))
        for work in workloads(config, replicas)
    ]

"""`sleep.recompute=auto`: for each curriculum stage the first mode that fits the memory of the fullest process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sleeptrain.config.schema import Config
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.activations import Activations
from sleeptrain.plan.live import Peak
from sleeptrain.plan.memory import stage_memory, stage_peak
from sleeptrain.plan.parameters import held_parameters
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


def choose(config: Config, fullest: Callable[[Config], int], memory: float) -> Choice:
    """The mode of a stage: `sleep.recompute`, or under `auto` the first that fits, and the last if none does.

    fullest: bytes of the fullest process under a configuration with a mode. memory: bytes of a process.
    """
    choice = Choice(config.sleep.recompute)
    for mode in modes_in_order(config) if choice.mode == AUTO else ():
        total = fullest(with_recompute(config, mode))
        choice = Choice(mode, total, total <= SHARE * memory)
        if choice.fits:
            break
    return choice


class FullestProcess:
    """The bytes of the fullest process of a layout.

    config: `model.vocab_size` is known. kernels: the recurrences are flash-linear-attention's, as on a GPU.
    """

    def __init__(self, config: Config, kernels: bool) -> None:
        self._config = config
        self._stages, self._costs = split_stages(config, config.parallel.pipeline), schedule_costs(config)
        self._held, self._counts = held_parameters(config, self._stages.bounds), Activations.of(config, kernels)

    def choose(self, work: Workload, memory: float) -> Choice:
        """The mode for this workload. memory: bytes of a process."""
        return choose(self._config, partial(self._bytes, work, self._peaks(work)), memory)

    def bytes(self, work: Workload) -> int:
        """The bytes of the fullest process in the configured mode."""
        return self._bytes(work, self._peaks(work), self._config)

    def _peaks(self, work: Workload) -> list[Peak | None]:
        plan = schedule(work.plans, self._stages, self._costs)
        return [stage_peak(self._config, work, plan, s) for s in range(len(self._held))]

    def _bytes(self, work: Workload, peaks: Sequence[Peak | None], tried: Config) -> int:
        memories = (
            stage_memory(tried, work, held, self._stages, s, self._counts, peaks[s])
            for s, held in enumerate(self._held)
        )
        return max(m.total for m in memories)


def choose_stages(config: Config, replicas: int, memory: float, kernels: bool) -> list[tuple[int, Choice]]:
    """(tokens seen at its begin, choice) of each curriculum stage that the run reaches. `model.vocab_size` is known.

    kernels: the recurrences are flash-linear-attention's, as on a GPU.
    """
    fullest = FullestProcess(config, kernels)
    return [(work.first_token, fullest.choose(work, memory)) for work in workloads(config, replicas)]

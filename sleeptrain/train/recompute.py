"""The recomputation mode of each stage of a run: `sleep.recompute`, or what `auto` chooses at the start."""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.config.schema import Config
from sleeptrain.distributed.memory import least_memory
from sleeptrain.distributed.world import World
from sleeptrain.plan.recompute import SHARE, Choice, choose_stages
from sleeptrain.plan.report import gib, short
from sleeptrain.sleep.recompute import AUTO


class RecomputeStages:
    """stages: (tokens seen at its begin, choice) of each stage, ascending. memory: bytes of the smallest process."""

    def __init__(self, stages: Sequence[tuple[int, Choice]], memory: int = 0):
        self._stages, self._memory = stages, memory

    def at(self, tokens: int) -> str:
        """The mode after so many tokens."""
        return next((c.mode for first, c in reversed(self._stages) if first <= tokens), self._stages[0][1].mode)

    def line(self) -> str | None:
        """The choice in one line; None if nothing was chosen."""
        if not self._memory:
            return None
        parts = [
            f"{choice.mode} ({gib(choice.total)} GiB) from token {short(first)}" for first, choice in self._changes()
        ]
        line = f"sleep.recompute=auto, of {gib(self._memory)} GiB a process: {', '.join(parts)}"
        if all(choice.fits for _, choice in self._stages):
            return line
        return (
            f"warning: {line}; the last does not fit within {SHARE:.0%}: use a smaller train.micro_batch, a larger "
            "parallel.tensor or parallel.pipeline, or ask `sleeptrain plan`"
        )

    def _changes(self) -> list[tuple[int, Choice]]:
        """The stages whose mode differs from the one before."""
        modes = [None, *(choice.mode for _, choice in self._stages)]
        return [stage for before, stage in zip(modes, self._stages, strict=False) if stage[1].mode != before]


def recompute_stages(config: Config, world: World) -> RecomputeStages:
    """The modes of a run, the same in all processes, which call it together. `model.vocab_size` must be known."""
    if config.sleep.recompute != AUTO:
        return RecomputeStages([(0, Choice(config.sleep.recompute))])
    memory = least_memory(world)
    return RecomputeStages(choose_stages(config, world.mesh.data.size, memory, world.device.type == "cuda"), memory)

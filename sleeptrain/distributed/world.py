"""All processes of a run: who speaks for them, and what they agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of a run.

    control: all processes over gloo, for small numbers on the CPU; None where there is one process.
    saving: the same once more, for the thread that writes checkpoints.
    opened: torch.distributed was initialised for this run and ends with it.
    """

    mesh: Mesh
    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    opened: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes: one of all does."""
        return self.rank == 0

    @property
    def part(self) -> Part:
        """The rows of each batch that this process's replica trains on."""
        return Part(self.mesh.data.rank, self.mesh.data.size)

    @property
    def model_parallel_size(self) -> int:
        """How many processes hold one copy of the model."""
        return self.mesh.tensor.size * self.mesh.pipeline.size

    def sum(self, *values: float) -> list[float]:
        """The sum over all processes of each value, in fp64."""
        if self.control is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, in all of them."""
        if self.control is None:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, value: object) -> bool:
        """Whether the value is the same in all processes."""
        return all(other == value for other in self.gather(value))

    def from_first(self, value: T) -> T:
        """The value that the process that leads has."""
        return self._from(0, value)

    def from_last(self, value: T) -> T:
        """The value that the last process, one of those that hold the model's end, has."""
        return self._from(self.size - 1, value)

    def _from(self, rank: int, value: T) -> T:
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, rank, group=self.control)
        return box[0]

    def all_or_raise(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """What the function returns in each process, by rank; `group`: over `saving` from the thread that saves.

        Where it raises in one process it does so in all: that one its own error, the others DataError with its text.
        """
        if self.control is None:
            return [function()]
        failed: Exception | None = None
        answer: tuple[T | None, str | None] = (None, None)
        try:
            answer = (function(), None)
        except Exception as error:
            failed, answer = error, (None, str(error))
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, answer, group=group or self.control)
        if failed is not None:
            raise failed
        for rank, (_, text) in enumerate(answers):
            if text is not None:
                raise DataError(f"process {rank}: {text}")
        return [result for result, _ in answers]

    def close(self) -> None:
        """Leaves together with the others; only at the end of a run that has not failed."""
        if self.control is None or not self.opened:
            return
        from megatron.core import parallel_state

        dist.barrier(group=self.control)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`: runs of consecutive ranks are drawn together."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    written = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {written}"

"""All processes of a run: the main process, and values that the processes exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.small_sums import all_reduce_small
from sleeptrain.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of a run.

    mesh: the axes of the run.
    device: this process's device.
    rank, size: this process's rank, and the number of processes.
    control: the group of all processes over gloo, for small values on the CPU; None for one process.
    saving: a second group of all processes, for the thread that writes checkpoints: it waits longer, and operations of
        two threads must not mix. Both groups connect two processes when they first communicate.
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
        """True in the main process (rank 0), the only one that writes."""
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
        """The sum over all processes of each value, in fp64, with the same bits in all."""
        return self.sum_and_max(values, ())[0]

    def sum_and_max(self, values: Sequence[float], others: Sequence[float]) -> tuple[list[float], list[float]]:
        """The sum over all processes of each of `values`, and the largest of each of `others`, in fp64."""
        if self.control is None:
            return list(values), list(others)
        sums, largest = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, others))
        all_reduce_small(sums, largest, self.control)
        return sums.tolist(), largest.tolist()

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor of one shape on the CPU, with the same bits in all."""
        if self.control is None:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total, group=self.control)
        return total

    def any(self, flag: bool) -> bool:
        """True if the flag is set in at least one process."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process."""
        if self.control is None:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, value: object) -> bool:
        """True if the value is the same in all processes."""
        return all(other == value for other in self.gather(value))

    def from_first(self, value: T) -> T:
        """The value of the main process (rank 0)."""
        return self._from(0, value)

    def from_last(self, value: T) -> T:
        """The value of the last process, which holds the model's end."""
        return self._from(self.size - 1, value)

    def _from(self, rank: int, value: T) -> T:
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, rank, group=self.control)
        return values[0]

    def all_or_raise(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """The function's results in all processes, by rank.

        If it raises in one process, all raise: that process its own error, the others DataError with its text.
        group: the thread that writes checkpoints must pass `saving`.
        """
        if self.control is None:
            return [function()]
        raised: Exception | None = None
        outcome: tuple[T | None, str | None] = (None, None)
        try:
            outcome = (function(), None)
        except Exception as error:
            raised, outcome = error, (None, str(error))
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=group or self.control)
        if raised is not None:
            raise raised
        for rank, (_, text) in enumerate(outcomes):
            if text is not None:
                raise DataError(f"process {rank}: {text}")
        return [result for result, _ in outcomes]

    def close(self) -> None:
        """Leaves torch.distributed together with the other processes. Only for the end of a run that has not failed."""
        if self.control is None or not self.opened:
            return
        from megatron.core import parallel_state

        dist.barrier(group=self.control)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`: consecutive ranks are written as a range."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"

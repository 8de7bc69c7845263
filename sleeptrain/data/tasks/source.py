"""A task as a source of batches: an endless sequence of new rows; each process draws its part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sleeptrain.data.batch import Batch, Part
from sleeptrain.data.position import check_position
from sleeptrain.data.tasks.task import Task


class TaskSource:
    """The rows of a task, numbered through the run. See `data.source.Source`.

    A row is a function of (settings, seed, its number). So the batch of a step is a function of (settings, seed, number
    of rows before it), for any number of processes.
    """

    def __init__(self, task: Task, seed: int, part: Part | None = None) -> None:
        self.task = task
        self.part = part or Part()
        self.sequence = task.sequence
        self.vocab_size, self.tokenizer_hash = task.vocab_size, task.tokenizer_hash
        self.held_out = (task.name,)
        self._seed = seed
        self._position = 0

    def batch(self, rows: int) -> Batch:
        local_rows = self.part.rows(rows)
        batch = self.task.rows(self._seed, self._position + local_rows.start, len(local_rows))
        self.skip(rows)
        return batch

    def skip(self, rows: int) -> None:
        self._position += rows

    def validation_batches(self, name: str, rows: int, count: int | None = None) -> Iterator[Batch]:
        """The held-out rows, the same for every seed. count: only the first batches."""
        total = self.task.num_held_out
        stop = total if count is None else min(total, count * rows)
        for first in range(0, stop, rows):
            yield self.task.held_out(first, min(rows, stop - first))

    def report(self) -> dict[str, Any]:
        return self.task.report()

    def state_dict(self) -> dict[str, Any]:
        """position: number of rows drawn so far."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state was saved with another seed or other settings of the task."""
        check_position(state, self._identity())
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {"data.seed": self._seed, **self.task.identity()}

"""The stream of training batches from token shards.

The batch of a step is a function of the data, the settings and the step. So the position is a few integers, which are
equal on all processes for any number of processes, and a step can be assembled at any time, also in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sleeptrain.data.ahead import Ahead, never
from sleeptrain.data.assemble import Assembler
from sleeptrain.data.assignment import Assignment, Source, StreamSettings
from sleeptrain.data.batch import Batch, Part
from sleeptrain.data.position import check_position
from sleeptrain.data.shards import TokenShards


class ShardStream:
    """Batches of `sources`, a mapping of names to token shards.

    part: the rows that this process reads. workers: number of steps that are prepared ahead, each by a thread.
    skip_damaged: see `Assembler`. stop: see `Ahead`. Raises DataError for a source with fewer tokens than a batch has
    rows.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        settings: StreamSettings,
        part: Part | None = None,
        workers: int = 0,
        skip_damaged: bool = False,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.assembler = Assembler(list(sources.values()), settings, skip_damaged)
        self.settings = settings
        self._sources = [Source(shards, name, settings) for name, shards in sources.items()]
        # The order of sources matters: it decides which of two due documents comes first, and the document ids.
        self._fingerprints = [[name, shards.fingerprint] for name, shards in sources.items()]
        self._part = part or Part()
        self._ahead: Ahead[Batch] = Ahead(workers, stop)
        self._assignment: Assignment | None = None
        self._cuts: list[list[int]] = []

    def batch(self, rows: int) -> Batch:
        """This part's rows of the next step's batch, which has `rows` rows in all."""
        assignment, step = self.next_step(rows)
        return self._ahead.take(self.assembler.batch, (assignment, self._part.rows(rows)), step)

    def next_step(self, rows: int) -> tuple[Assignment, int]:
        """(assignment, step in it) of the next step. Moves the position, without reading."""
        if self._assignment is None:
            self._assignment = Assignment(self._sources, self.settings, rows)
            self._cuts.append([rows, 0])
        elif self._assignment.num_rows != rows:
            self._assignment = self._assignment.following(self._cuts[-1][1], rows)
            self._cuts.append([rows, 0])
        self._cuts[-1][1] += 1
        return self._assignment, self._cuts[-1][1] - 1

    def epochs(self) -> dict[str, float]:
        """How often each source has been read; exact except for the documents that rows have begun."""
        owed = [0] * len(self._sources) if self._assignment is None else self._assignment.owed(self._cuts[-1][1])
        return {source.name: n / source.line.epoch_size for source, n in zip(self._sources, owed, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The position, as [rows, steps] for each number of rows in turn, and the identity of data and settings."""
        return {"cuts": [list(cut) for cut in self._cuts], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`. Raises DataError if it belongs to other data or settings."""
        check_position(state, self._identity())
        self.seek(state["cuts"])

    def seek(self, cuts: Sequence[tuple[int, int]]) -> None:
        """Go to the position after these (rows, steps): for each pair, `steps` steps with `rows` rows."""
        self._assignment = None
        self._cuts = []
        for rows, steps in cuts:
            self.next_step(rows)
            self._cuts[-1][1] = steps

    def _identity(self) -> dict[str, Any]:
        stages = self.settings.stages
        return {
            "data.seed": self.settings.seed,
            "data.sequence": self.settings.sequence,
            "data.layout": self.settings.layout,
            "data.shards.shuffle": self.settings.shuffle_shards,
            "data.shards.sources": self._fingerprints,
            "data.shards.weights": [[s.tokens, {name: str(share) for name, share in s.shares.items()}] for s in stages],
        }

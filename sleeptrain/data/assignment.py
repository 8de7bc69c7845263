"""The pieces of documents that each row of the batch reads, while the number of rows stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sleeptrain.data.lanes import Cut, Lane
from sleeptrain.data.mixture import Quota
from sleeptrain.data.order import Line, ShardedDocuments
from sleeptrain.data.philox import named_stream, random_words
from sleeptrain.data.rows import Row
from sleeptrain.errors import DataError


@dataclass(frozen=True)
class MixtureShares:
    """The sources' shares, which sum to 1, from `tokens` seen on."""

    tokens: int
    shares: Mapping[str, Fraction]


@dataclass(frozen=True)
class StreamSettings:
    """The settings that, together with the data, determine the batches of the stream.

    sequence: T, tokens of a row in a step.
    stages: stages of the mixture; the first begins at 0 tokens.
    layout: `lanes`: a row continues its document in the next step; `packed`: the same tokens, but nothing is carried
    from step to step; `one_document`: lanes, where each document begins at a row's first token and pads follow it.
    seed: seed of the order of documents.
    shuffle_shards: number of shards whose documents are shuffled together.
    """

    sequence: int
    stages: Sequence[MixtureShares]
    layout: str = "lanes"
    seed: int = 0
    shuffle_shards: int = 8

    @property
    def unit(self) -> int:
        """A document takes a multiple of this number of positions."""
        return self.sequence if self.layout == "one_document" else 1


class Source:
    """One source of a mixture: its line of documents, and the mean number of positions of a document."""

    def __init__(self, shards: ShardedDocuments, name: str, settings: StreamSettings) -> None:
        self.name = name
        self.line = Line(shards, name, settings.seed, settings.shuffle_shards, settings.unit)
        self.mean_size = self.line.epoch_size // int(shards.shard_documents_S.sum())


@dataclass(frozen=True)
class Start:
    """The position at which an assignment begins.

    seen: tokens that all rows together have read before.
    owed: tokens of each source that were due before.
    unread: for each source (unread spans of its line, number of the first epoch after them).
    """

    seen: int
    owed: Sequence[int]
    unread: Sequence[tuple[Sequence[tuple[int, int]], int]]


class Assignment:
    """The rows of a batch, from the step at which the batch got this number of rows.

    start: the position of the data at that step; None: the beginning. Raises DataError for a source with fewer tokens
    than there are rows.
    """

    def __init__(
        self, sources: Sequence[Source], settings: StreamSettings, rows: int, start: Start | None = None
    ) -> None:
        self.num_rows = rows
        self._sources = sources
        self._settings = settings
        self._start = start or Start(0, [0] * len(sources), [((), 0)] * len(sources))
        self._cuts = []
        for source, (spans, first_epoch) in zip(sources, self._start.unread, strict=True):
            if source.line.epoch_size // settings.unit < rows:
                what = "tokens" if settings.unit == 1 else f"rows of {settings.unit} tokens"
                raise DataError(
                    f"data.shards.sources.{source.name} has {source.line.epoch_size // settings.unit} {what}, fewer "
                    f"than the {rows} rows of a batch (data.batch): give it more text, or take fewer rows"
                )
            self._cuts.append(Cut(source.line.epoch_size, rows, settings.unit, spans, first_epoch))
        self._rows: dict[int, Row] = {}

    def pieces(self, step: int, row: int) -> np.ndarray:
        """The pieces that row `row` reads in step `step`, which begins at row position step * T: ROW_PIECE [P].

        The first and the last piece are not cut to the step.
        """
        begin = step * self._settings.sequence
        return self._row(row).pieces(begin, begin + self._settings.sequence)

    def following(self, steps: int, rows: int) -> Assignment:
        """The assignment to `rows` rows after `steps` steps of this one. It first reads the rest of begun epochs."""
        position = steps * self._settings.sequence
        read_BK = [self._row(row).read(position) for row in range(self.num_rows)]
        unread = [cut.unread(read_B) for cut, read_B in zip(self._cuts, zip(*read_BK, strict=True), strict=True)]
        start = Start(self._start.seen + self.num_rows * position, self.owed(steps), unread)
        return Assignment(self._sources, self._settings, rows, start)

    def owed(self, steps: int) -> list[int]:
        """The positions of each source that are due from the start of training to the end of `steps` steps of this."""
        clock = steps * self._settings.sequence
        return [
            before + self.num_rows * self._quota(source).owed(clock)
            for before, source in zip(self._start.owed, self._sources, strict=True)
        ]

    def _row(self, row: int) -> Row:
        if row not in self._rows:
            lanes = [Lane(source.line, cut, row) for source, cut in zip(self._sources, self._cuts, strict=True)]
            self._rows[row] = Row(lanes, [self._quota(source, self._lead(source, row)) for source in self._sources])
        return self._rows[row]

    def _lead(self, source: Source, row: int) -> int:
        """A random delay of a row's first document, below the mean document size.

        It puts the rows out of phase, so that each step mixes the sources.
        """
        if len(self._sources) == 1:
            return 0
        word = random_words(1, self._settings.seed, named_stream("lead", source.name), row)[0]
        return int(word) % source.mean_size

    def _quota(self, source: Source, lead: int = 0) -> Quota:
        """The quota of a source in a row, with the stages' tokens converted to the clock of this assignment's rows."""
        starts, shares = [0], [self._settings.stages[0].shares[source.name]]
        for stage in self._settings.stages[1:]:
            start = -(-(stage.tokens - self._start.seen) // self.num_rows)
            if start <= 0:
                shares[-1] = stage.shares[source.name]
            else:
                starts.append(start)
                shares.append(stage.shares[source.name])
        return Quota(starts, shares, lead)

"""Which pieces of which documents each row of the batch reads, while the batch keeps its number of rows."""

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
    """The sources' shares, which sum to 1, from a number of `tokens` seen on."""

    tokens: int
    shares: Mapping[str, Fraction]


@dataclass(frozen=True)
class StreamSettings:
    """What, besides the data, decides what a step reads.

    sequence: T, tokens of a row in a step.
    stages: of the mixture, the first from 0 tokens on.
    layout: `lanes`: a row goes on with its document at the next step; `packed`: the same rows, each standing alone;
    `one_document`: lanes, where a document begins at a row's first token and pads follow its last one.
    shuffle_shards: shards whose documents are shuffled together.
    """

    sequence: int
    stages: Sequence[MixtureShares]
    layout: str = "lanes"
    seed: int = 0
    shuffle_shards: int = 8

    @property
    def unit(self) -> int:
        """Positions that a document takes a multiple of."""
        return self.sequence if self.layout == "one_document" else 1


class Source:
    """One source of a mixture: its documents in order, and the mean number of positions that one takes."""

    def __init__(self, shards: ShardedDocuments, name: str, settings: StreamSettings) -> None:
        self.name = name
        self.line = Line(shards, name, settings.seed, settings.shuffle_shards, settings.unit)
        self.mean_size = self.line.epoch_size // int(shards.shard_documents_S.sum())


@dataclass(frozen=True)
class Start:
    """What had happened before an assignment.

    seen: tokens that all rows together had read. owed: those that were due from each source. unread: for each source
    the spans of its line that earlier rows left, and the first epoch behind them.
    """

    seen: int
    owed: Sequence[int]
    unread: Sequence[tuple[Sequence[tuple[int, int]], int]]


class Assignment:
    """The rows of a batch from the moment on at which it got this number of rows.

    Raises DataError for a source with fewer tokens than there are rows.
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
        """The pieces that row `row` reads of in step `step`, each whole: ROW_PIECE, from row position step * T on."""
        begin = step * self._settings.sequence
        return self._row(row).pieces(begin, begin + self._settings.sequence)

    def following(self, steps: int, rows: int) -> Assignment:
        """The assignment to `rows` rows after `steps` steps of this one: what is unread of the epochs begun goes on."""
        position = steps * self._settings.sequence
        read_BK = [self._row(row).read(position) for row in range(self.num_rows)]
        unread = [cut.unread(read_B) for cut, read_B in zip(self._cuts, zip(*read_BK, strict=True), strict=True)]
        start = Start(self._start.seen + self.num_rows * position, self.owed(steps), unread)
        return Assignment(self._sources, self._settings, rows, start)

    def owed(self, steps: int) -> list[int]:
        """The positions of each source that were due from the first step of all to the end of `steps` steps."""
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
        """Up to a document's mean size: the rows' clocks are out of phase, so that they mix at any moment."""
        if len(self._sources) == 1:
            return 0
        word = random_words(1, self._settings.seed, named_stream("lead", source.name), row)[0]
        return int(word) % source.mean_size

    def _quota(self, source: Source, lead: int = 0) -> Quota:
        """What a row is owed of the source, the stages' tokens turned into the clock of this assignment's rows."""
        starts, shares = [0], [self._settings.stages[0].shares[source.name]]
        for stage in self._settings.stages[1:]:
            start = -(-(stage.tokens - self._start.seen) // self.num_rows)
            if start <= 0:
                shares[-1] = stage.shares[source.name]
            else:
                starts.append(start)
                shares.append(stage.shares[source.name])
        return Quota(starts, shares, lead)

"""A second, plain implementation of the order of training data: every token of every epoch stands in a list.

Nothing is searched, cached or planned ahead: epochs are lists that are shuffled, lanes are slices of them, and a row's
clock ticks token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import count, groupby
from math import floor
from typing import NamedTuple

import torch

from sleeptrain.data.assignment import StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.philox import named_stream, random_order, random_words
from tests.data.numbered import NumberedShards


class Slot(NamedTuple):
    """Position `place` of an epoch. token: None for the pads after a document. target: None at a document's end."""

    epoch: int
    place: int
    shard: int
    document: int
    token: int | None
    target: int | None


Span = list[Slot]  # the slots between two cuts


class Reading(NamedTuple):
    """A slot that a row reads. first: the place of the first slot of the document in the row's lane."""

    source: int
    first: int
    slot: Slot


class OracleSource:
    """One source: its epochs, and the spans that the rows have not read."""

    def __init__(self, shards: NumberedShards, name: str, settings: StreamSettings) -> None:
        self.name = name
        self._shards, self._settings = shards, settings
        self._epochs: dict[int, Span] = {}
        self.unread: list[Span] = []
        self.first_epoch = 0

    def epoch(self, number: int) -> Span:
        """All slots of an epoch."""
        if number not in self._epochs:
            self._epochs[number] = list(self._slots(number))
        return self._epochs[number]

    @property
    def mean_size(self) -> int:
        return len(self.epoch(0)) // int(self._shards.shard_documents_S.sum())

    def lane(self, row: int, rows: int) -> Iterator[Span]:
        """The spans that row `row` of `rows` reads: its share of the unread spans, then of each epoch."""
        unread = [(number, slot) for number, span in enumerate(self.unread) for slot in span]
        for _, part in groupby(self._share(unread, row, rows), key=lambda numbered: numbered[0]):
            yield [slot for _, slot in part]
        for number in count(self.first_epoch):
            yield self._share(self.epoch(number), row, rows)

    def leave(self, num_read: Sequence[int]) -> None:
        """Ends the lanes of the rows. num_read: the number of slots that each row has read."""
        rows = len(num_read)
        first_whole = self.first_epoch
        for row, number in enumerate(num_read):
            spans = self.lane(row, rows)
            while number > 0:
                span = next(spans)
                number -= len(span)
                first_whole = max(first_whole, span[0].epoch + 1)
        remaining: list[Span] = []
        for row, number in enumerate(num_read):
            for span in self.lane(row, rows):
                if span[0].epoch >= first_whole:
                    break
                remaining += [span[number:]] if span[number:] else []
                number = max(0, number - len(span))
        self.unread = [span for epoch in range(first_whole) for span in remaining if span[0].epoch == epoch]
        self.first_epoch = first_whole

    def _slots(self, epoch: int) -> Iterator[Slot]:
        place = 0
        seed, per_group = self._settings.seed, self._settings.shuffle_shards
        shards = random_order(self._shards.num_shards, seed, named_stream("shards", self.name, epoch)).tolist()
        groups = [shards[first : first + per_group] for first in range(0, len(shards), per_group)]
        for number, group in enumerate(groups):
            documents = [(shard, i) for shard in group for i in range(len(self._shards.lengths(shard)))]
            order = random_order(len(documents), seed, named_stream("documents", self.name, epoch, number))
            for shard, index in [documents[i] for i in order]:
                tokens = self._shards.document(shard, index).tolist()
                pads = [None] * (-len(tokens) % self._settings.unit)
                for token, target in zip([*tokens, *pads], [*tokens[1:], None, *pads], strict=True):
                    yield Slot(epoch, place, shard, index, token, target)
                    place += 1

    def _share(self, slots: list, row: int, rows: int) -> list:
        unit = self._settings.unit
        units = len(slots) // unit
        return slots[row * units // rows * unit : (row + 1) * units // rows * unit]


class Oracle:
    """The batches that the steps of a run read."""

    def __init__(self, sources: Mapping[str, NumberedShards], settings: StreamSettings) -> None:
        self.sources = [OracleSource(shards, name, settings) for name, shards in sources.items()]
        self._settings = settings
        self._seen = 0

    def batches(self, plan: Sequence[int]) -> list[Batch]:
        """The batches of further steps. plan: the number of rows of each step."""
        sequence = self._settings.sequence
        result = []
        for rows, group in groupby(plan):
            steps = len(list(group))
            # The last reading is that of the step after these: it shows whether a row goes on.
            read = [self._row(row, rows, steps * sequence + 1) for row in range(rows)]
            for step in range(steps):
                result.append(self._batch([row[: (step + 1) * sequence + 1] for row in read], step * sequence))
            for k, source in enumerate(self.sources):
                source.leave([sum(reading.source == k for reading in row[:-1]) for row in read])
            self._seen += rows * steps * sequence
        return result

    def _row(self, row: int, rows: int, length: int) -> list[Reading]:
        """The first `length` readings of a row: at each tick of its clock it reads the documents that are due."""
        pieces = [self._pieces(k, row, rows) for k in range(len(self.sources))]
        taken = [0] * len(pieces)
        read: list[Reading] = []
        for owed in self._owed(row, rows):
            for k in range(len(pieces)):
                while owed[k] > taken[k]:
                    piece = next(pieces[k])
                    taken[k] += len(piece)
                    read += piece
            if len(read) >= length:
                return read[:length]
        raise AssertionError

    def _pieces(self, k: int, row: int, rows: int) -> Iterator[list[Reading]]:
        for span in self.sources[k].lane(row, rows):
            for _, document in groupby(span, key=lambda slot: (slot.shard, slot.document)):
                slots = list(document)
                yield [Reading(k, slots[0].place, slot) for slot in slots]

    def _owed(self, row: int, rows: int) -> Iterator[list[int]]:
        """The tokens owed to each source at ticks 1, 2, ..., rounded down at each tick and at the end of a stage."""
        stages = self._settings.stages
        full = [-self._lead(source, row) for source in self.sources]
        part = [Fraction(0)] * len(full)
        stage = -1
        for tick in count():
            now = max(i for i, s in enumerate(stages) if s.tokens <= self._seen + rows * tick)
            if now != stage:
                full = [w + floor(p) for w, p in zip(full, part, strict=True)]
                part = [Fraction(0)] * len(full)
                stage = now
            part = [p + stages[now].shares[source.name] for p, source in zip(part, self.sources, strict=True)]
            yield [w + floor(p) for w, p in zip(full, part, strict=True)]

    def _lead(self, source: OracleSource, row: int) -> int:
        if len(self.sources) == 1:
            return 0
        word = random_words(1, self._settings.seed, named_stream("lead", source.name), row)[0]
        return int(word) % source.mean_size

    def _batch(self, read: list[list[Reading]], begin: int) -> Batch:
        """The batch of the readings from `begin` on, without the last one of each row, which is of the next step."""

        def goes_on(row: list[Reading], at: int) -> bool:
            if not at or self._settings.layout == "packed" or row[at].slot.token is None:
                return False
            return _document(row[at - 1]) == _document(row[at])

        now = [row[begin:-1] for row in read]
        return Batch(
            torch.tensor([[PAD_TOKEN if r.slot.token is None else r.slot.token for r in row] for row in now]),
            torch.tensor([[IGNORE if r.slot.target is None else r.slot.target for r in row] for row in now]),
            torch.tensor([[PAD if r.slot.token is None else self._id(r) for r in row] for row in now]),
            torch.tensor([goes_on(row, begin) for row in read]),
            torch.tensor([goes_on(row, len(row) - 1) for row in read]),
        )

    def _id(self, reading: Reading) -> int:
        position = reading.slot.epoch * len(self.sources[reading.source].epoch(0)) + reading.first
        return position * len(self.sources) + reading.source


def _document(reading: Reading) -> tuple[int, int, int]:
    return reading.source, reading.slot.epoch, reading.first

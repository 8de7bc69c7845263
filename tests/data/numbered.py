"""Made-up sources in which every token is different, so that a token shows its place, and streams of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st

from sleeptrain.data import rows
from sleeptrain.data.assignment import MixtureShares, StreamSettings
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.mixture import shares
from sleeptrain.data.shards import DamagedDocument
from sleeptrain.data.stream import ShardStream

SOURCES = 8  # more than any test has


class NumberedShards:
    """Shards of documents of these lengths. token = its place in the source * SOURCES + the number of the source.

    damaged: the (shard, index) of documents that cannot be read. lengths_read: the shards whose lengths were read, in
    order. fetched: the shards that were prefetched.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], source: int = 0, damaged: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.shard_tokens_S = np.array([sum(shard) for shard in lengths], np.int64)
        self.shard_documents_S = np.array([len(shard) for shard in lengths], np.int64)
        self.num_shards = len(lengths)
        self.num_tokens = int(self.shard_tokens_S.sum())
        self.fingerprint = f"{source}: {list(map(list, lengths))}"
        self.damaged = set(damaged)
        self.lengths_read: list[int] = []
        self.fetched: list[int] = []
        self._lengths = [np.array(shard, np.int64) for shard in lengths]
        self._firsts = np.cumsum([0, *self.shard_tokens_S])
        self._source = source

    def lengths(self, shard: int) -> np.ndarray:
        self.lengths_read.append(shard)
        return self._lengths[shard]

    def document(self, shard: int, index: int) -> np.ndarray:
        if (shard, index) in self.damaged:
            raise DamagedDocument(f"shard {shard}, document {index}", shard, index)
        first = self._firsts[shard] + self._lengths[shard][:index].sum()
        return (first + np.arange(self._lengths[shard][index])) * SOURCES + self._source

    def prefetch(self, shard: int) -> None:
        self.fetched.append(shard)


@dataclass(frozen=True)
class Case:
    """A stream and its use. sources: {name: lengths of the documents of each shard}. plan: the rows of each step."""

    sources: Mapping[str, Sequence[Sequence[int]]]
    settings: StreamSettings
    plan: Sequence[int]
    stretch: int

    def shards(self) -> dict[str, NumberedShards]:
        return {name: NumberedShards(lengths, k) for k, (name, lengths) in enumerate(self.sources.items())}

    def stream(self, **options: Any) -> ShardStream:
        return ShardStream(self.shards(), self.settings, **options)  # type: ignore[arg-type]

    @contextmanager
    def planned(self) -> Iterator[None]:
        """Sets the length of stretches to this case's. No result may depend on it."""
        with patch.object(rows, "STRETCH", self.stretch):
            yield


@contextmanager
def short_stretches() -> Iterator[None]:
    """Shortens stretches for small sources, of which a usual stretch is hundreds of epochs."""
    with patch.object(rows, "STRETCH", 2**10):
        yield


LENGTHS = st.sampled_from([1, 1, 2, 3, 5, 9, 17, 40, 130])
WEIGHTS = st.sampled_from([0.0, 0.0, 0.05, 0.3, 0.5, 1.0, 2.0])


@st.composite
def cases(draw: st.DrawFn, max_sources: int = 3, max_cuts: int = 4, max_steps: int = 12) -> Case:
    """Streams of one to three small sources, whose weights and numbers of rows change."""
    shard = st.lists(LENGTHS, min_size=1, max_size=6)
    names = [f"s{k}" for k in range(draw(st.integers(1, max_sources)))]
    sources = {name: draw(st.lists(shard, min_size=1, max_size=6)) for name in names}
    sequence, layout = draw(st.sampled_from([1, 3, 8, 17])), draw(st.sampled_from(["lanes", "packed", "one_document"]))
    unit = sequence if layout == "one_document" else 1
    most = min(sum(-(-length // unit) for shard in lengths for length in shard) for lengths in sources.values())
    cuts = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, max_steps)), min_size=1, max_size=max_cuts))
    plan = [min(rows, most) for rows, steps in cuts for _ in range(steps)]
    starts = sorted(draw(st.sets(st.integers(1, sequence * sum(plan)), max_size=2)))
    stages = [MixtureShares(tokens, shares(draw(_weights(names)))) for tokens in [0, *starts]]
    settings = StreamSettings(sequence, stages, layout, draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    return Case(sources, settings, plan, draw(st.sampled_from([4, 50, 600])))


def _weights(names: Sequence[str]) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries(dict.fromkeys(names, WEIGHTS)).filter(lambda weights: any(weights.values()))


def mixture(**weights: float) -> list[MixtureShares]:
    """The same weights from the first token on."""
    return [MixtureShares(0, shares(weights))]


def tokens(batch: Batch) -> list[int]:
    """The tokens of a batch, pads left out."""
    return batch.tokens_BT[batch.documents_BT != PAD].tolist()


def joined(parts: Sequence[Batch]) -> Batch:
    """The batch that consists of the parts of all ranks."""
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in Batch.__dataclass_fields__))


def assert_equal(one: Batch, other: Batch) -> None:
    for name in Batch.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name

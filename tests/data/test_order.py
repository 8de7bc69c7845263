from __future__ import annotations

import numpy as np
import pytest

from sleeptrain.data.order import Line
from tests.data.numbered import SOURCES, NumberedShards

LENGTHS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8, 9], [7, 9, 3], [2, 3, 8, 4, 6], [2]]


def line(lengths: list[list[int]] = LENGTHS, name: str = "text", seed: int = 0, **options: int) -> Line:
    return Line(NumberedShards(lengths), name, seed, **options)


def epoch(made: Line, number: int) -> np.ndarray:
    return made.documents(number * made.epoch_size, (number + 1) * made.epoch_size)


def names(documents: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(documents["shard"].tolist(), documents["index"].tolist(), strict=True))


def test_the_order_is_the_same_for_ever() -> None:
    expected = [(0, 2), (0, 1), (4, 0), (1, 0), (4, 1), (0, 0)]
    assert names(epoch(line(shuffle_shards=3), 0))[:6] == expected


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
def test_an_epoch_holds_every_document_once(group: int, unit: int) -> None:
    made = line(shuffle_shards=group, unit=unit)
    for number in (0, 1, 10**9):
        documents = epoch(made, number)
        assert sorted(names(documents)) == [(s, i) for s, shard in enumerate(LENGTHS) for i in range(len(shard))]
        lengths = [LENGTHS[shard][index] for shard, index in names(documents)]
        assert documents["length"].tolist() == lengths
        assert documents["size"].tolist() == [-(-length // unit) * unit for length in lengths]
        ends = np.cumsum(documents["size"])
        assert (documents["begin"] - number * made.epoch_size).tolist() == (ends - documents["size"]).tolist()
        assert ends[-1] == made.epoch_size


@pytest.mark.parametrize("unit", [1, 4])
def test_any_part_equals_that_part_of_the_whole(unit: int) -> None:
    """Each part comes from a new object: no result depends on earlier requests."""
    expected = line(shuffle_shards=2, unit=unit).documents(0, 400)
    size = line(unit=unit).epoch_size
    ends = (expected["begin"] + expected["size"]).tolist()
    made = line(shuffle_shards=2, unit=unit)
    group_ends = sorted({made.group_end(position) for position in range(2 * size)})
    for begin in range(0, 2 * size, 5):
        made = line(shuffle_shards=2, unit=unit)
        for end in range(begin, begin + 60, 7):
            inside = (expected["begin"] >= begin) & (expected["begin"] < end)
            assert (made.documents(begin, end) == expected[inside]).all()
            assert len(made.documents(begin, end)) == inside.sum()
        holding = next(i for i, stop in enumerate(ends) if stop > begin)
        assert made.document_at(begin) == expected[holding]
        assert made.next_begin(begin) == min(b for b in expected["begin"].tolist() if b >= begin)
        assert made.group_end(begin) == min(stop for stop in group_ends if stop > begin)
    assert len(group_ends) == 2 * 4 and size in group_ends


def test_epochs_seeds_and_names_have_orders_of_their_own() -> None:
    orders = [names(epoch(line(seed=seed), number)) for seed in (0, 1) for number in range(3)]
    orders.append(names(epoch(line(name="code"), 0)))
    assert len({tuple(order) for order in orders}) == 7
    assert names(epoch(line(), 1)) == orders[1]


def test_documents_are_shuffled_within_random_groups() -> None:
    """A document's neighbours come only from the W shards of its group. The group is a random choice of all shards."""
    many = [[2] * 50 for _ in range(48)]
    groups: set[frozenset[int]] = set()
    for number in range(4):
        order = epoch(line(many, shuffle_shards=4), number)["shard"].reshape(12, 200)
        found = [frozenset(group.tolist()) for group in order]
        assert all(len(group) == 4 for group in found)
        assert frozenset().union(*found) == frozenset(range(48))
        groups.update(found)
        # Neighbours on disk are in one group as often as by chance: 47 neighbouring pairs * 3/47.
        assert sum({shard, shard + 1} <= group for group in found for shard in range(47)) <= 10
    assert len(groups) == 48
    ragged = epoch(line([[1]] * 10, shuffle_shards=4), 0)["shard"]
    assert sorted(ragged.tolist()) == list(range(10))


def test_all_places_inside_a_group_are_equally_likely() -> None:
    """The mean displacement of a uniform permutation of D is (D^2 - 1) / (3 D): a third of the group."""
    size, shards = 2_000, 8
    many = [[1] * (size // shards) for _ in range(shards)]
    displacements, places = [], np.zeros((4, 4))
    for number in range(20):
        made = line(many, shuffle_shards=shards)
        order = made._epoch(number)[0]
        rank = {int(shard): place for place, shard in enumerate(order)}
        found = epoch(made, number)
        before = np.array([rank[s] * (size // shards) + i for s, i in names(found)])
        displacements.append(np.abs(before - np.arange(size)).mean())
        np.add.at(places, (before * 4 // size, np.arange(size) * 4 // size), 1)
    assert abs(np.mean(displacements) / (size / 3) - 1) < 0.01
    expected = 20 * size / 16
    assert ((places - expected) ** 2 / expected).sum() < 21.7  # chi-square of 9 degrees of freedom, 1 in 100


def test_only_the_shards_of_the_group_are_read() -> None:
    shards = NumberedShards([[2] * 5 for _ in range(100)])
    made = Line(shards, "text", 0, shuffle_shards=4)
    found = made.documents(10**12, 10**12 + 8)
    assert len(shards.lengths_read) == 4 and set(found["shard"].tolist()) <= set(shards.lengths_read)
    made.prefetch(10**12)
    assert sorted(shards.fetched) == sorted(shards.lengths_read)
    assert not Line(shards, "text", 0).documents(7, 7).size


def test_tokens_are_where_the_order_says() -> None:
    shards = NumberedShards(LENGTHS, 3)
    place = 0
    for shard, index in names(np.sort(epoch(line(), 0), order=["shard", "index"])):
        tokens = shards.document(shard, index).tolist()
        assert tokens == [(place + i) * SOURCES + 3 for i in range(len(tokens))]
        place += len(tokens)

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.data.lanes import Cut, Lane
from sleeptrain.data.order import Line
from tests.data.numbered import NumberedShards

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)
LENGTHS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8, 9], [17, 1]]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, int, list[tuple[int, int]]]:
    """A cut, its epochs' size, and its leftovers."""
    unit, units = draw(st.sampled_from([1, 1, 4])), draw(st.integers(1, 30))
    rows = draw(st.integers(1, min(units, 7)))
    bounds = sorted(draw(st.sets(st.integers(0, 2 * units), max_size=6)))
    spans = [(a * unit, b * unit) for a, b in list(pairwise(bounds))[::2] if a // units == (b - 1) // units]
    return Cut(units * unit, rows, unit, spans, first_epoch=2), units * unit, spans


def positions(cut: Cut, row: int, begin: int, end: int) -> list[int]:
    """The line positions at the lane positions [begin, end)."""
    found = {}
    for span in cut.lane(row, begin, end):
        for i in range(span.end - span.begin):
            assert span.lane + i not in found
            found[span.lane + i] = span.begin + i
    return [found[lane] for lane in range(begin, end)]


@FEW
@given(cuts())
def test_lanes_share_leftovers_and_epochs_in_order(case: tuple[Cut, int, list[tuple[int, int]]]) -> None:
    cut, size, spans = case
    leftovers = [position for begin, end in spans for position in range(begin, end)]
    lanes = [positions(cut, row, 0, len(leftovers) // cut.rows + size // cut.rows * 3 + 20) for row in range(cut.rows)]
    leftover_parts = [[position for position in lane if position < 2 * size] for lane in lanes]
    assert list(chain(*leftover_parts)) == leftovers
    for epoch in (2, 3):
        parts = [[position for position in lane if position // size == epoch] for lane in lanes]
        assert list(chain(*parts)) == list(range(epoch * size, (epoch + 1) * size))
        assert all(parts)
    for lane, part in zip(lanes, leftover_parts, strict=True):
        assert lane[: len(part)] == part and lane[len(part) :] == sorted(lane[len(part) :])


@FEW
@given(cuts(), st.data())
def test_any_part_of_a_lane_equals_that_part_of_the_whole(
    case: tuple[Cut, int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    cut, size, _ = case
    row = data.draw(st.integers(0, cut.rows - 1))
    begin, length = data.draw(st.tuples(st.integers(0, 4 * size), st.integers(0, 50)))
    assert positions(cut, row, begin, begin + length) == positions(cut, row, 0, begin + length)[begin:]
    for span in cut.lane(row, begin, begin + length):
        assert span.lane < begin + length and begin < span.lane + span.end - span.begin


@FEW
@given(cuts(), st.data())
def test_unread_spans_hold_all_that_is_unread(
    case: tuple[Cut, int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Epochs that no row has begun are not in them."""
    cut, size, spans = case
    read_B = [data.draw(st.integers(0, 3 * size)) for _ in range(cut.rows)]
    spans_left, epoch = cut.unread(read_B)
    read = [position for row in range(cut.rows) for position in positions(cut, row, 0, read_B[row])]
    everything = {position for begin, end in spans for position in range(begin, end)} | set(
        range(2 * size, epoch * size)
    )
    unread = [position for begin, end in spans_left for position in range(begin, end)]
    assert len(set(unread)) == len(unread) and all(begin < end for begin, end in spans_left)
    assert sorted(read + unread) == sorted(everything)
    assert epoch == max([1, *(position // size for position in read)]) + 1
    epochs = [begin // size for begin, _ in spans_left]
    assert epochs == sorted(epochs)


def test_a_lane_is_cut_into_pieces_of_documents() -> None:
    """Compares every part of the lanes of two cuts with pieces that are made position by position."""
    for unit in (1, 4):
        line = Line(NumberedShards(LENGTHS), "text", 0, 2, unit)
        size = line.epoch_size
        documents = line.documents(0, 8 * size).tolist()
        owner = [document for document in documents for _ in range(document[1])]
        for cut in (Cut(size, 3, unit), Cut(size, 3, unit, [(4, 12), (size - 8, size)], 1)):
            for row in range(3):
                lane = Lane(line, cut, row)
                spans = list(cut.lane(row, 0, 2 * size))
                expected = []
                for span in spans:
                    for at in range(span.begin, span.end):
                        if at == span.begin or owner[at] != owner[at - 1]:
                            expected.append([span.lane + at - span.begin, at, 0, at - owner[at][0], 0, *owner[at][3:]])
                        expected[-1][2] += 1
                        expected[-1][4] += at - owner[at][0] < owner[at][2]
                end = spans[-1].lane
                for begin in range(0, end, 3):
                    for stop in (begin, begin + 1, begin + 17, end):
                        overlapping = [tuple(piece) for piece in expected if begin <= piece[0] < stop]
                        assert lane.pieces(begin, stop).tolist() == overlapping
                    assert lane.next_begin(begin) == min(piece[0] for piece in expected if piece[0] >= begin)


def test_shards_are_prefetched_once() -> None:
    shards = NumberedShards([[2] * 10 for _ in range(24)])
    line = Line(shards, "text", 0, shuffle_shards=2)
    lane = Lane(line, Cut(line.epoch_size, 2), 1)
    for position in range(0, 4 * line.epoch_size, 3):
        before = len(shards.fetched)
        lane.prefetch(position)
        ahead = set(shards.fetched)
        [piece] = lane.pieces(lane.next_begin(position), lane.next_begin(position) + 1)
        assert int(piece["shard"]) in ahead
        assert len(shards.fetched) - before in (0, 4)
    groups_behind = 4 * line.epoch_size // 40
    assert 4 * groups_behind <= len(shards.fetched) <= 4 * (groups_behind + 8)


def test_pieces_fill_their_span() -> None:
    line = Line(NumberedShards(LENGTHS), "text", 0, 2)
    pieces = Lane(line, Cut(line.epoch_size, 4), 2).pieces(0, 200)
    ends = pieces["begin"] + pieces["size"]
    assert pieces["begin"][0] == 0 and (pieces["begin"][1:] == ends[:-1]).all()
    assert (np.diff(pieces["line"]) > 0).all()

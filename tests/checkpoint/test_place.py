"""Places of elements: boxes cover them in order, and overlaps are the elements that two slices share."""

from __future__ import annotations

import random

import pytest
import torch

from sleeptrain.checkpoint.place import Place, Slice, overlaps


def positions(part: Slice) -> torch.Tensor:
    """The positions of a slice's elements in the flattened whole tensor, in the shape of the slice."""
    whole = torch.arange(torch.Size(part.shape).numel()).view(part.shape)
    for dim, ranges in enumerate(part.ranges):
        chosen = torch.tensor([i for start, stop in ranges for i in range(start, stop)], dtype=torch.int64)
        whole = whole.index_select(dim, chosen)
    return whole


def some_slice(rng: random.Random, shape: tuple[int, ...]) -> Slice:
    bounds = {d: sorted(rng.sample(range(size + 1), min(4, size + 1))) for d, size in enumerate(shape)}
    pairs = {d: [(b[i], b[i + 1]) for i in range(0, len(b) - 1, 2)] for d, b in bounds.items()}
    return Slice.cut(shape, {d: p for d, p in pairs.items() if rng.random() < 0.7})


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_overlaps_against_lists_of_positions(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(0, 4)))
    first, second = some_slice(rng, shape), some_slice(rng, shape)
    start, stop = sorted(rng.choices(range(first.numel + 1), k=2))
    place, flat = Place(first, start, stop - start), positions(first).reshape(-1)
    covered = [positions(part).reshape(-1) for _, part in place.boxes()]
    assert torch.equal(torch.cat([flat[:0], *covered]), flat[start:stop])
    before = [at for at, _ in place.boxes()]
    assert before == [sum(map(len, covered[:i])) for i in range(len(covered))]
    ours, theirs, shared = positions(first), positions(second), list[int]()
    for a, b, sizes in overlaps(first, second):
        box = [slice(at, at + size) for at, size in zip(a, sizes, strict=True)]
        other = [slice(at, at + size) for at, size in zip(b, sizes, strict=True)]
        assert torch.equal(ours[tuple(box)], theirs[tuple(other)])
        shared += ours[tuple(box)].reshape(-1).tolist()
    assert sorted(shared) == sorted({*ours.reshape(-1).tolist()} & {*theirs.reshape(-1).tolist()})


def test_shares_are_even_and_cover_the_place() -> None:
    place = Place(Slice.cut((4, 5), {1: [(0, 1), (3, 5)]}), 1, 10)
    shares = [place.share(index, 3) for index in range(3)]
    assert [(share.start, share.numel) for share in shares] == [(1, 3), (4, 3), (7, 4)]
    assert Place.whole((2, 3)).is_whole and not shares[0].is_whole
    assert Place.whole(()).numel == 1 and Place.whole(()).is_whole

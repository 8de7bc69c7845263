"""Each element is read by one process and reaches all; a process that cannot read lets no other wait."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sleeptrain.checkpoint.place import Place, Slice
from sleeptrain.distributed.mesh import Axis
from sleeptrain.errors import DataError
from sleeptrain.parallel.share_reads import Wanted, share_reads
from tests.checkpoint.contents import InMemory
from tests.parallel.processes import run_ranks

TENSORS = {f"w{i}": torch.arange(4.0 * i, 4.0 * i + 4 * (i + 1)).view(i + 1, 4) for i in range(5)}
COLUMNS = {name: Place.of(Slice.cut(t.shape, {1: [(0, 1), (3, 4)]})) for name, t in TENSORS.items()}


class Counted(InMemory):
    """Counts the elements that it gives. broken: the process in which it cannot read w2."""

    def __init__(self, broken: int | None = None):
        super().__init__(TENSORS)
        self.read, self._broken = 0, broken

    def elements(self, name: str, place: Place) -> torch.Tensor:
        if name == "w2" and dist.get_rank() == self._broken:
            raise DataError("w2 cannot be read")
        self.read += place.numel
        return super().elements(name, place)


def shared(broken: int | None = None) -> tuple[int, dict[str, list[float]], str]:
    saved, found, error = Counted(broken), dict[str, list[float]](), ""

    def wanted(name: str) -> Wanted:
        return Wanted(name, COLUMNS[name], lambda values: found.__setitem__(name, values.tolist()))

    data = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    try:
        share_reads(saved, [wanted(name) for name in TENSORS], data, torch.device("cpu"))
    except DataError as raised:
        error = str(raised)
    return saved.read, found, error


@pytest.mark.parametrize("size", [1, 3])
def test_all_get_all_and_each_element_is_read_once(size: int) -> None:
    results = run_ranks(shared, size)
    assert sum(read for read, _, _ in results) == sum(place.numel for place in COLUMNS.values())
    assert all(read for read, _, _ in results)
    expected = {name: tensor[:, [0, 3]].reshape(-1).tolist() for name, tensor in TENSORS.items()}
    assert all(found == expected and not error for _, found, error in results)


def test_one_that_cannot_read_raises_and_the_others_end() -> None:
    results = run_ranks(shared, 2, 0) + run_ranks(shared, 2, 1)
    assert [error for _, _, error in results].count("w2 cannot be read") == 1, "one of the two was to read it"
    assert all(len(found) == len(TENSORS) for _, found, _ in results)

"""Sums and largest values of a few numbers over all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sleeptrain.distributed.small_sums import all_reduce_small
from tests.parallel.processes import run_ranks


def _joined() -> tuple[list[float], list[float], list[float]]:
    rank, group = dist.get_rank(), dist.new_group(backend="gloo")
    assert group is not None
    sums, largest = torch.tensor([rank + 1.0, 0.1 * 3**rank]).double(), torch.tensor([rank, -rank]).double()
    all_reduce_small(sums, largest, group)
    none = torch.zeros(0, dtype=torch.float64)
    alone = torch.ones(1, dtype=torch.float64)
    all_reduce_small(alone, none, group)
    return sums.tolist(), largest.tolist(), alone.tolist()


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_all_ranks_get_the_same_bits(size: int) -> None:
    results = run_ranks(_joined, size)
    assert all(result == results[0] for result in results)
    (count, total), largest, alone = results[0]
    assert (count, alone) == (size * (size + 1) / 2, [size]) and largest == [size - 1, 0]
    assert total == pytest.approx(sum(0.1 * 3**rank for rank in range(size)), rel=1e-6)

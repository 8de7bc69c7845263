"""The place of a process among all, and the values that processes exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.distributed.world import World, name_ranks
from sleeptrain.errors import DataError
from tests.checkpoint.worlds import all_or_raise, alone
from tests.parallel.processes import run_ranks


def test_one_process_is_the_main_one_and_gets_its_own_values() -> None:
    world = alone()
    assert world.is_main and world.part == Part(0, 1) and world.model_parallel_size == 1
    assert world.sum(1.5, 2) == [1.5, 2] and world.gather("a") == ["a"]
    assert world.any(True) and not world.any(False) and world.agree({"a": 1})
    assert world.from_first("a") == world.from_last("a") == "a"
    assert world.all_or_raise(lambda: 3) == [3]
    with pytest.raises(ZeroDivisionError):
        world.all_or_raise(lambda: 1 // 0)
    world.close()


def test_a_replica_trains_on_its_part_of_the_rows() -> None:
    world = World(Mesh(Axis(2, 1), Axis(3, 0), Axis(4, 2)), torch.device("cpu"), rank=9, size=24)
    assert world.part == Part(2, 4) and world.model_parallel_size == 6 and not world.is_main


def results(world: World) -> dict[str, Any]:
    """The results of a world's calls in one process."""

    def fail_in_one() -> None:
        if world.rank == 1:
            raise OSError("disk full")

    with pytest.raises((OSError, DataError)) as error:
        world.all_or_raise(fail_in_one)
    return {
        "sum": world.sum(world.rank, 0.5),
        "any": [world.any(world.rank == 1), world.any(False)],
        "gather": world.gather(f"from {world.rank}"),
        "agree": [world.agree("same"), world.agree(world.rank)],
        "ends": [world.from_first(world.rank), world.from_last(world.rank)],
        "all": world.all_or_raise(lambda: world.rank * 10),
        "error": f"{type(error.value).__name__}: {error.value}",
    }


def test_processes_exchange_values_and_errors() -> None:
    first, second = run_ranks(lambda: results(all_or_raise()), 2)
    assert first.pop("error") == "DataError: process 1: disk full" and second.pop("error") == "OSError: disk full"
    assert first == second
    assert (first["sum"], first["gather"], first["all"]) == ([1.0, 1.0], ["from 0", "from 1"], [0, 10])
    assert (first["any"], first["agree"], first["ends"]) == ([True, False], [True, False], [0, 1])


@pytest.mark.parametrize(
    ("ranks", "name"),
    [([3], "rank 3"), ([1, 0], "ranks 0-1"), ([5, 0, 2, 3, 4], "ranks 0, 2-5"), ([7, 9], "ranks 7, 9")],
)
def test_consecutive_ranks_are_a_range(ranks: list[int], name: str) -> None:
    assert name_ranks(ranks) == name

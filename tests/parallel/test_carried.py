"""Carried memory on its way into a checkpoint and out of it, for tensor ranks and replicas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.fit import CARRIED
from sleeptrain.checkpoint.place import Placed
from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.model.state import Boundary, FastWeights
from sleeptrain.parallel.carried import load_carried, own_carried
from sleeptrain.parallel.tensor.sharding import ModelSharding
from tests.checkpoint.contents import InMemory, of_shares
from tests.parallel.cases import Case, random_state
from tests.parallel.state_shards import take_state
from tests.parallel.threads import run_threads

CASE = Case(num_kv_heads=1, boundary=Boundary(sliding_window=4, carry_conv=True))
CPU = torch.device("cpu")
SHARDING = ModelSharding(CASE.config, 2)


@pytest.fixture(scope="module")
def memory() -> FastWeights:
    """Memory of two rows, over all layers and heads; the ranks share the one key-value head."""
    return random_state(CASE, 1)


def shares(patch: pytest.MonkeyPatch, memory: FastWeights, carrying: tuple[int, ...]) -> list[dict[str, Placed]]:
    """The share of each rank: two tensor ranks of two replicas of a row; only `carrying` have a memory."""

    def run(group: Any, tensor: int) -> dict[str, Placed]:
        mesh = Mesh(Axis(2, tensor), Axis(), Axis(2, group.rank, group))
        own = take_state(SHARDING, memory.rows(torch.tensor([group.rank])), tensor) if group.rank in carrying else None
        return own_carried(own, mesh, SHARDING, CPU)

    return [share for tensor in range(2) for share in run_threads(patch, 2, partial(run, tensor=tensor))]


def named(state: FastWeights) -> dict[str, torch.Tensor]:
    return {CARRIED + name: tensor for name, tensor in state.to_state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_each_rank_writes_its_rows_and_heads_and_a_share_of_what_others_hold_too(
    monkeypatch: pytest.MonkeyPatch, memory: FastWeights
) -> None:
    parts = shares(monkeypatch, memory, (0, 1))
    assert_same(of_shares(parts), named(memory))
    numbers = [sum(tensor.numel() for tensor, _ in part.values()) for part in parts]
    assert max(numbers) - min(numbers) <= len(parts[0])


def test_a_replica_without_memory_has_empty_rows(monkeypatch: pytest.MonkeyPatch, memory: FastWeights) -> None:
    parts = shares(monkeypatch, memory, (1,))
    assert_same(of_shares(parts), named(memory.keep_rows(torch.tensor([False, True]))))


def test_nothing_is_saved_where_nobody_carries(monkeypatch: pytest.MonkeyPatch, memory: FastWeights) -> None:
    assert shares(monkeypatch, memory, ()) == [{}] * 4


@pytest.mark.parametrize(("data", "tensor"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_process_loads_its_rows_and_heads(memory: FastWeights, data: int, tensor: int) -> None:
    saved = InMemory(named(memory) | {"model/norm.weight": torch.zeros(1)})
    found = load_carried(saved, Part(data, 2), range(3), SHARDING, tensor, CPU)
    assert found is not None
    assert_same(named(found), named(take_state(SHARDING, memory.rows(torch.tensor([data])), tensor)))


def test_a_stage_loads_its_layers_only(memory: FastWeights) -> None:
    found = load_carried(InMemory(named(memory)), Part(0, 1), range(1, 2), SHARDING, 0, CPU)
    assert found is not None
    assert [state is not None for state in found.layers] == [False, True, False]


def test_a_checkpoint_without_memory_carries_none() -> None:
    assert load_carried(InMemory({}), Part(0, 1), range(3), SHARDING, 0, CPU) is None

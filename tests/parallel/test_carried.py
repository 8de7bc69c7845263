"""Carried memory on its way into a checkpoint and out of it, for tensor ranks and replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.fit import CARRIED
from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.model.state import Boundary, FastWeights
from sleeptrain.parallel.carried import load_carried, own_carried
from sleeptrain.parallel.tensor.sharding import ModelSharding
from tests.checkpoint.contents import InMemory
from tests.parallel.cases import Case, random_state
from tests.parallel.threads import run_threads

CASE = Case(num_kv_heads=1, boundary=Boundary(sliding_window=4, carry_conv=True))
CPU = torch.device("cpu")
SHARDING = ModelSharding(CASE.config, 2)


@pytest.fixture(scope="module")
def memory() -> FastWeights:
    """Memory of two rows, over all layers and heads; the ranks share the one key-value head."""
    return random_state(CASE, 1)


def owned(patch: pytest.MonkeyPatch, memory: FastWeights, carrying: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """The tensors that each rank owns: two tensor ranks of two replicas of a row; only `carrying` have a memory."""

    def run(group: Any) -> dict[str, torch.Tensor]:
        data, tensor = divmod(group.rank, 2)
        mesh = Mesh(Axis(2, tensor), Axis(), Axis(2, data))
        own = SHARDING.take_state(memory.rows(torch.tensor([data])), tensor) if data in carrying else None
        return own_carried(own, mesh, SHARDING, group, CPU)

    return run_threads(patch, 4, run)


def named(state: FastWeights) -> dict[str, torch.Tensor]:
    return {CARRIED + name: tensor for name, tensor in state.to_state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_shares_are_joined_to_whole_tensors_of_one_owner_each(
    monkeypatch: pytest.MonkeyPatch, memory: FastWeights
) -> None:
    parts = owned(monkeypatch, memory, (0, 1))
    assert sum(map(len, parts)) == len(named(memory)) and sum(map(bool, parts)) == 3, "a layer has one owner"
    assert_same({name: tensor for part in parts for name, tensor in part.items()}, named(memory))


def test_a_replica_without_memory_has_empty_rows(monkeypatch: pytest.MonkeyPatch, memory: FastWeights) -> None:
    parts = owned(monkeypatch, memory, (1,))
    expected = memory.keep_rows(torch.tensor([False, True]))
    assert_same({name: tensor for part in parts for name, tensor in part.items()}, named(expected))


def test_nothing_is_saved_where_nobody_carries(monkeypatch: pytest.MonkeyPatch, memory: FastWeights) -> None:
    assert owned(monkeypatch, memory, ()) == [{}] * 4


@pytest.mark.parametrize(("data", "tensor"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_process_loads_its_rows_and_heads(memory: FastWeights, data: int, tensor: int) -> None:
    saved = InMemory(named(memory) | {"model/norm.weight": torch.zeros(1)})
    found = load_carried(saved, Part(data, 2), range(3), SHARDING, tensor, CPU)
    assert found is not None
    assert_same(named(found), named(SHARDING.take_state(memory.rows(torch.tensor([data])), tensor)))


def test_a_stage_loads_its_layers_only(memory: FastWeights) -> None:
    found = load_carried(InMemory(named(memory)), Part(0, 1), range(1, 2), SHARDING, 0, CPU)
    assert found is not None
    assert [state is not None for state in found.layers] == [False, True, False]


def test_a_checkpoint_without_memory_carries_none() -> None:
    assert load_carried(InMemory({}), Part(0, 1), range(3), SHARDING, 0, CPU) is None

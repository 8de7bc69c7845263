from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh
from tests.parallel.processes import PATIENCE, run_ranks


def _places() -> list[tuple[int, int, float]]:
    """Of each axis: size, rank, and the sum of the world ranks on it."""
    mesh = Mesh.build(2, 2)
    assert mesh.pipeline.rank == parallel_state.get_pipeline_model_parallel_rank()
    places = []
    for axis in (mesh.tensor, mesh.pipeline, mesh.data):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=axis.group)
        places.append((axis.size, axis.rank, float(total)))
    return places


def test_tensor_ranks_are_neighbours_and_stages_are_furthest_apart():
    assert run_ranks(_places, 4) == [
        [(2, 0, 1.0), (2, 0, 2.0), (1, 0, 0.0)],
        [(2, 1, 1.0), (2, 0, 4.0), (1, 0, 1.0)],
        [(2, 0, 5.0), (2, 1, 2.0), (1, 0, 2.0)],
        [(2, 1, 5.0), (2, 1, 4.0), (1, 0, 3.0)],
    ]


def _state_places() -> list[tuple[int, int, list[int]]]:
    """Of the axes of ZeRO's state, and of the group that holds it: size, rank, and the world ranks in it."""
    mesh = Mesh.build(2, 1, shard_replicas=2)
    groups = (mesh.shard.group, mesh.copies.group, mesh.state)
    return [(dist.get_world_size(g), dist.get_rank(g), dist.get_process_group_ranks(g)) for g in groups]


@pytest.mark.slow
def test_state_is_cut_over_neighbouring_replicas():
    found = run_ranks(_state_places, 8)
    assert found[0] == [(2, 0, [0, 2]), (2, 0, [0, 4]), (4, 0, [0, 1, 2, 3])]
    assert found[3] == [(2, 1, [1, 3]), (2, 0, [3, 7]), (4, 3, [0, 1, 2, 3])]
    assert found[6] == [(2, 1, [4, 6]), (2, 1, [2, 6]), (4, 2, [4, 5, 6, 7])]


def test_one_process_needs_no_groups():
    mesh = Mesh.single()
    assert [(axis.size, axis.rank, axis.group) for axis in (mesh.tensor, mesh.pipeline, mesh.data)] == [
        (1, 0, None)
    ] * 3


def test_a_single_process_does_not_import_megatron():
    code = (
        "import sys; from sleeptrain.parallel.build import build_model; from sleeptrain.distributed.mesh import Mesh;"
        "from tests.models import tiny_config; build_model(tiny_config(), Mesh.single());"
        "assert not any(name.startswith(('megatron', 'deepspeed')) for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)

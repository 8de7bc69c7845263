from __future__ import annotations

import subprocess
import sys

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

"""DeepSpeed gets the process groups of the mesh."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.parallel.zero.mpu import MegatronUnit
from tests.parallel.processes import run_ranks

pytestmark = pytest.mark.usefixtures("imported")


def test_deepspeed_knows_every_group() -> None:
    def run() -> list[int]:
        unit = MegatronUnit(Mesh.build(2, 2))
        kinds = ("model", "data", "tensor_model", "pipeline_model")
        sizes = []
        for kind in kinds:
            group = getattr(unit, f"get_{kind}_parallel_group")()
            size, rank = (
                getattr(unit, f"get_{kind}_parallel_world_size")(),
                getattr(unit, f"get_{kind}_parallel_rank")(),
            )
            assert (size, rank) == (dist.get_world_size(group), dist.get_rank(group))
            sizes.append(size)
        return [*sizes, unit.get_model_parallel_rank()]

    results = run_ranks(run, 4)
    assert all(r[:4] == [4, 1, 2, 2] for r in results)
    assert sorted(r[4] for r in results) == [0, 1, 2, 3]

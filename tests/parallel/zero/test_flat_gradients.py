"""ZeRO-1's flat gradients: what each rank receives, and that views stay the parameters' gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.zero.engine import wrap
from sleeptrain.parallel.zero.flat_gradients import FlatGradients
from sleeptrain.parallel.zero.matrix_exchange import LayoutError
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases


def test_a_rank_receives_the_sum_of_its_partition_alone() -> None:
    def run() -> list[list[float]]:
        engine = cases.engine_for(cases.small_model(), 1)
        flat, wrapped = engine._flat, engine.deepspeed_engine.optimizer
        assert flat is not None
        for number, tensor in enumerate(flat.tensors):
            tensor.copy_(torch.arange(len(tensor)) % 101 + number + 1000 * dist.get_rank())
        flat.sum()
        for number, tensor in enumerate(flat.tensors):
            size = len(tensor) // 2
            place = torch.arange(len(tensor))[dist.get_rank() * size :][:size]
            partition = wrapped.averaged_gradients[number].flat_partition
            padded = sum(p.numel() for p in wrapped.bit16_groups[number])
            expected = (2 * (place % 101 + number) + 1000).float()
            assert torch.equal(partition[place < padded], expected[place < padded])
        return []

    run_ranks(run, 2)


def test_gradients_stay_views_after_steps_and_no_hook_of_deepspeed_is_called() -> None:
    def run() -> None:
        engine = cases.engine_for(cases.small_model(), 1)
        rows = cases.rows_of(cases.step_batch(0), dist.get_rank(), 2)
        for _ in range(2):
            engine.zero_grad()
            cases.whole_rounds(engine, rows, False)
            inside = [
                any(t.data_ptr() <= p.grad.data_ptr() < t.data_ptr() + t.nbytes for t in engine._flat.tensors)
                for p in engine.parameters.values()
            ]
            assert all(inside) and any(bool(t.any()) for t in engine._flat.tensors)
            engine.step(1.0)
            assert not any(bool(t.any()) for t in engine._flat.tensors)
        hooks = [p._post_accumulate_grad_hooks for p in engine.parameters.values()]
        assert not any(hooks)

    run_ranks(run, 2)


def test_frozen_parameters_count_neither_in_the_norm_nor_in_the_update() -> None:
    def run() -> tuple[float, float]:
        model = cases.small_model()
        roles = parameter_roles(model)
        frozen = {name for name in roles if name.startswith("blocks.1.")}
        roles |= {name: replace(roles[name], frozen=(1,)) for name in frozen}
        engine = wrap(model, roles, cases.OPTIM, 1, Mesh.build(1, 1))
        before = {name: p.detach().clone() for name, p in engine.parameters.items()}
        engine.freeze(1)
        cases.whole_rounds(engine, cases.step_batch(0), False)
        squares = [float(p.grad.square().sum()) for name, p in engine.parameters.items() if name not in frozen]
        norm = engine.step(1.0)
        assert all(torch.equal(p, before[name]) is (name in frozen) for name, p in engine.parameters.items())
        return norm, sum(squares) ** 0.5

    [(norm, expected)] = run_ranks(run, 1)
    assert norm == pytest.approx(expected, rel=1e-5)


def test_an_optimizer_of_another_deepspeed_is_refused() -> None:
    other: Any = SimpleNamespace(bit16_groups_flat=[])
    with pytest.raises(LayoutError, match="ZeRO-1 has round_robin_bit16_groups"):
        FlatGradients(other, Axis(), Axis())

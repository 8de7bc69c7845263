"""The parameters that each process holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.optimizers import ParameterRole
from sleeptrain.plan.parameters import Held, overlaps, partition_size, role_groups, training_state
from tests.plan.planned import planned, text


def test_parameters_of_all_stages_are_those_of_the_model():
    config = text("parallel.pipeline=2", "parallel.tensor=2", "train.micro_batch=4", "model.tie_embeddings=false")
    plan = planned(config, 4)
    with torch.device("meta"):
        total = sum(p.numel() for p in Hybrid(config.model).parameters())
    assert plan.parameters == total and plan.embedding_parameters == 2 * 1000 * 128
    held = sum(h.numel for stage in plan.held for h in stage)
    assert total / 2 < held < 0.51 * total, "norms alone are held by both tensor ranks"


def held(numel: int, kind: str = "muon", always_frozen: bool = False) -> Held:
    return Held(f"p{numel}", numel, (numel,), ParameterRole(kind), always_frozen)


def test_a_single_process_keeps_no_state_of_parameters_that_never_train() -> None:
    state = training_state([held(10), held(7, "adamw"), held(5, always_frozen=True)], 0, (1, 1, 1))
    assert (state.weights, state.master, state.gradients) == (4 * 22, 0, 4 * 17)
    assert state.optimizer == 4 * (10 + 2 * 7), "one average of Muon's, two of AdamW's"
    assert state.total == state.weights + state.gradients + state.optimizer
    assert training_state([held(5, always_frozen=True)], 0, (1, 1, 2)).gradients == 4 * 5


def test_partitions_are_equal_and_aligned() -> None:
    assert [partition_size([held(n)], 2) for n in (1, 4, 5, 8, 9)] == [2, 2, 4, 4, 6]


def test_a_partition_may_end_inside_a_parameter() -> None:
    group = [held(3), held(6), held(1)]
    parts = [[(h.numel, inside) for h, inside in part] for part in overlaps(group, 2)]
    assert parts == [[(3, 3), (6, 3)], [(6, 3), (1, 1)]]


@pytest.mark.parametrize(("zero", "optimizer"), [(0, 40), (1, 24), (2, 24), (3, 20)])
def test_zero_shares_the_optimizer_among_replicas(zero: int, optimizer: int) -> None:
    state = training_state([held(10)], zero, (1, 1, 2))
    assert state.optimizer == optimizer and (state.master == 0) is (zero == 0)


def test_without_a_pipeline_zero_2_keeps_the_gradients_of_its_partition() -> None:
    parameters = [held(4), held(8)]
    assert training_state(parameters, 2, (1, 1, 2)).gradients == 4 * 12, "the second lies in both"
    assert training_state([held(8), held(8)], 2, (1, 1, 2)).gradients == 4 * 8
    assert training_state([held(8), held(8)], 2, (1, 2, 2)).gradients == 4 * 16


def test_groups_are_by_kind_and_under_zero_1_by_dtype() -> None:
    group = [held(1, "adamw"), held(2), replace(held(3, "adamw"), narrow=True)]
    assert sorted(sorted(h.numel for h in found) for found in role_groups(group, 2)) == [[1, 3], [2]]
    assert sorted(sorted(h.numel for h in found) for found in role_groups(group, 1)) == [[1], [2], [3]]


def test_zero_1_keeps_narrow_weights_in_two_bytes() -> None:
    parameters = [held(4), replace(held(8), narrow=True)]
    state = training_state(parameters, 1, (1, 1, 2))
    assert (state.weights, state.master, state.gradients) == (4 * 4 + 2 * 8, 4 * 6, 4 * 12)
    assert (
        training_state(parameters, 2, (1, 1, 2)).weights == training_state(parameters, 1, (1, 1, 1)).weights == 4 * 12
    )


def test_what_is_read_in_bf16_is_narrow_where_it_lies() -> None:
    settings = ("parallel.pipeline=2", "train.micro_batch=4", "train.precision=bf16")
    first, last = planned(text(*settings), 2).held
    names = [{h.name for h in stage if h.narrow} for stage in (first, last)]
    assert all("embedding.weight" in narrow for narrow in names), "tied: the last stage multiplies by it"
    assert all(h.narrow == (len(h.shape) == 2 and "conv" not in h.name) for h in (*first, *last))
    assert not any(h.narrow for h in planned(text("train.precision=fp32")).held[0])

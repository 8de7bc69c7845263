"""The traffic of processes in a step: bytes of collectives, and the collectives that a layout has."""

from __future__ import annotations

import pytest

from sleeptrain.plan.links import DataTraffic, Payload, TensorTraffic, sent_bytes
from tests.plan.planned import planned, text

SMALL = ("sleep.passes=1", "data.sequence=128", "data.batch=4", "train.precision=fp32")


def data(zero: int, processes: int) -> tuple[DataTraffic, int]:
    """The traffic between the replicas of one stage, and the bytes of its weights."""
    plan = planned(text(*SMALL, f"parallel.zero={zero}"), processes)
    return plan.steps[0].data[0], 4 * plan.parameters


def tensor(*more: str) -> TensorTraffic:
    return planned(text(*SMALL, "parallel.tensor=2", *more), 2).steps[0].tensor[0]


def test_a_ring_sends_each_part_to_all_others() -> None:
    assert sent_bytes(Payload(all_reduce=8, all_gather=16), 4) == (2 * 8 + 16) * 3 / 4
    assert sent_bytes(Payload(reduce_scatter=8), 1) == sent_bytes(Payload(), 4) == 0


def test_one_tensor_rank_sends_nothing() -> None:
    [traffic] = planned(text(*SMALL)).steps[0].tensor
    assert traffic == TensorTraffic(Payload(), Payload(), Payload()) and traffic.total == Payload()


def test_recomputation_sends_again() -> None:
    assert tensor("sleep.recompute=none").recompute == Payload()
    again = tensor("sleep.recompute=block")
    assert Payload() < again.recompute < again.forward
    assert again.total == again.forward + again.recompute + again.backward


def test_split_sequences_are_gathered_and_scattered_instead_of_reduced() -> None:
    unsplit, split = tensor(), tensor("parallel.sequence=true")
    assert "reduce_scatter" not in unsplit.forward and split.forward["reduce_scatter"] > 0
    assert split.forward["all_reduce"] < unsplit.forward["all_reduce"]


def test_one_replica_sends_no_gradients() -> None:
    assert data(0, 1)[0] == DataTraffic(Payload(), Payload(), 0)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_replicas_share_gradients_by_their_zero_stage(zero: int) -> None:
    traffic, weights = data(zero, 2)
    if zero in (1, 3):  # padded
        assert set(traffic.reduce) == {"reduce_scatter"} and traffic.reduce["reduce_scatter"] >= weights
        assert traffic.gather["all_gather"] >= weights
    else:
        assert traffic.reduce == Payload(all_reduce=weights)
        assert (traffic.gather["all_gather"] >= weights) is (zero > 0)
    assert traffic.exchange > 0, "of Muon's matrices"

"""The traffic of processes in a step: bytes of collectives, and the collectives that a layout has."""

from __future__ import annotations

import pytest

from sleeptrain.distributed.gpus import Gpu, find_gpu
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.links import DataTraffic, LinkShares, Payload, TensorTraffic, sent_bytes
from sleeptrain.plan.report import to_text
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


def test_links_take_time_for_bytes_and_for_hops() -> None:
    gpu = Gpu(flops=1, memory=1, bandwidth=1, intra=100, inter=10)
    links = LinkShares(inside=0.5, between=0.8, hop_inside=0.25, hop_between=2)
    assert links.seconds(gpu, sent=100, passes=2, size=8, far=False) == 100 / 50 + 2 * 3 * 0.25
    assert links.seconds(gpu, sent=100, passes=3, size=9, far=True) == 100 / 8 + 3 * 4 * 2
    assert links.seconds(gpu, sent=0, passes=5, size=1, far=True) == 0


def test_each_collective_passes_its_ring() -> None:
    none, again = tensor("sleep.recompute=none"), tensor("sleep.recompute=block")
    assert 0 < none.passes < again.passes < 2 * none.passes
    long = tensor("data.sequence=256", "sleep.recompute=none")
    once = 2 * 4  # the gradients of four blocks are summed once, however many windows there are
    assert long.passes - once == 2 * (none.passes - once)
    assert data(0, 1)[0].passes == 0 < data(0, 2)[0].passes < data(1, 2)[0].passes


def test_one_tensor_rank_sends_nothing() -> None:
    [traffic] = planned(text(*SMALL)).steps[0].tensor
    assert traffic == TensorTraffic(Payload(), Payload(), Payload(), 0) and traffic.total == Payload()


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


def test_groups_of_replicas_send_the_sums_of_their_part_alone_to_each_other() -> None:
    """As much as all replicas send inside a group, and between groups a part of it: less crosses machines."""
    plans = [planned(text(*SMALL, "data.batch=16", *more), 16) for more in ((), ("parallel.shard_replicas=8",))]
    (all_of_them, groups) = (plan.steps[0].data[0] for plan in plans)
    assert all_of_them.copies == Payload() and all_of_them.copies_passes == 0
    assert groups.copies == Payload(all_reduce=groups.reduce["reduce_scatter"] // 8) and groups.copies_passes > 0
    assert groups.reduce["reduce_scatter"] == pytest.approx(all_of_them.reduce["reduce_scatter"], rel=0.01)
    assert plans[1].steps[0].memory[0].optimizer == pytest.approx(2 * plans[0].steps[0].memory[0].optimizer, rel=0.01)
    assert "ZeRO-1 over 8 of them" in to_text(plans[1])


def test_groups_in_machines_gather_faster() -> None:
    def seconds(*more: str) -> float:
        plan = make_plan(text(*SMALL, "data.batch=64", *more), 64, find_gpu("H100"), 0.4)
        assert plan.steps[0].speed is not None
        return plan.steps[0].speed.data

    assert seconds("parallel.shard_replicas=8") < 0.5 * seconds()
    assert seconds("parallel.shard_replicas=8") < seconds("parallel.shard_replicas=16")


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

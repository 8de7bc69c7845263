"""The most that a pipeline rank holds, computed by hand for one round of one window."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.parallel.pipeline.schedule import Receive, Schedule, schedule
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.live import Memory, Peak, peak_held
from sleeptrain.plan.shared_head import SharedHead
from tests.parallel.pipeline.cases import even_stages, plan
from tests.plan.planned import planned, text

FEATURES = 8 * 128 * 128 * 4  # bytes of a message: rows, tokens, width, fp32
STATE = [10, 0, 100, 1000]  # of the layers; the first two are on rank 0


def scheduled(sequences: int) -> Schedule:
    config = text("parallel.pipeline=2", "train.micro_batch=8", "sleep.passes=1", "data.sequence=128")
    rounds = planned(config, 2).steps[0].workload.rounds
    assert len(rounds) == 1
    return schedule([rounds] * sequences, split_stages(config, 2), schedule_costs(config))


def memory(carried: bool = False, normed: bool = False) -> Memory:
    return Memory(4 * 128, STATE, 8, carried, normed)


def test_the_first_rank_holds_its_tokens_its_output_and_the_gradient() -> None:
    assert peak_held(scheduled(1), 0, memory()) == Peak(10, 3 * FEATURES)


def test_the_last_rank_holds_its_input_until_its_backward() -> None:
    assert peak_held(scheduled(1), 1, memory()) == Peak(FEATURES + 1100, 2 * FEATURES)


def test_features_that_are_normed_between_passes_are_one_more_tensor() -> None:
    assert peak_held(scheduled(1), 1, memory(normed=True)).messages == 3 * FEATURES


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_of_a_shared_head_keeps_its_input_and_its_logits(rank: int) -> None:
    """Every token has a target, so the input is as large as the features in fp32."""
    shared = ("parallel.pipeline=2", "train.micro_batch=8", "sleep.passes=1", "data.sequence=128")
    config = text(*shared, "parallel.split_head=true")
    work = planned(config, 2).steps[0].workload
    plan = schedule([work.rounds], split_stages(config, 2), schedule_costs(config))
    head = SharedHead.of(config, work)
    assert head is not None and len(work.rounds) == 1
    logits = 8 * 128 * config.model.vocab_size // 2 * 4
    assert head.logits(work.rounds[0], rank) == logits
    peak = peak_held(plan, rank, replace(memory(), head=head))
    assert peak.boundary == (10, FEATURES + 1100)[rank] + FEATURES + logits
    assert peak.messages < 4 * FEATURES + 32 * 8 * 128


@pytest.mark.parametrize(("rank", "state"), [(0, 10), (1, 1100)])
def test_a_carried_state_exists_before_and_after(rank: int, state: int) -> None:
    new, carried = (peak_held(scheduled(1), rank, memory(carried)).boundary for carried in (False, True))
    assert carried - new == state


def test_every_sequence_in_flight_adds_to_the_first_rank() -> None:
    one, two = (peak_held(scheduled(sequences), 0, memory()) for sequences in (1, 2))
    assert (two.boundary, two.messages - one.messages) == (2 * one.boundary, 2 * FEATURES)


def test_micro_batches_that_share_a_plan_hold_what_they_hold_one_by_one() -> None:
    """The last micro-batch, whose receives come first, is followed by itself, though its rounds are those of others."""
    one, other = tuple(plan(3, 3)), tuple(plan(2, 2))
    plans, sizes = (one, other, one, one, one), Memory(8, [10, 20, 30, 40], 1, True, False)
    made = schedule(plans, even_stages(2))
    early = [a for a in made.ranks[1] if isinstance(a, Receive) and a.message.micro_batch == 4]
    late = [a for a in made.ranks[1] if a not in early]
    shared = replace(made, ranks=(made.ranks[0], (*early, *late)))
    copies = replace(shared, plans=tuple(tuple(list(rounds)) for rounds in plans))
    assert len({id(rounds) for rounds in copies.plans}) == len(plans) and len(early) > 1
    assert [peak_held(shared, r, sizes) for r in range(2)] == [peak_held(copies, r, sizes) for r in range(2)]
    assert peak_held(shared, 1, sizes).messages > peak_held(made, 1, sizes).messages

"""What a plan says of a head that stages share."""

from __future__ import annotations

from sleeptrain.parallel.pipeline.graph import Kind
from sleeptrain.plan.shared_head import SharedHead
from tests.plan.planned import planned, text

SHARED = ("parallel.pipeline=2", "train.micro_batch=2", "sleep.passes=1", "parallel.split_head=true")


def test_stages_hold_and_compute_equal_parts() -> None:
    whole, shared = (planned(text(*SHARED, f"parallel.split_head={split}"), 2) for split in (False, True))
    vocab_size, dim = shared.config.model.vocab_size, shared.config.model.dim
    first, last = ([h for h in held if h.name == "embedding.weight"] for held in shared.held)
    assert [h.numel for h in first] == [vocab_size * dim]
    assert [h.numel for h in last] == [(vocab_size - vocab_size // 2) * dim]
    assert shared.steps[0].tied == 4 * last[0].numel < whole.steps[0].tied
    busy = shared.steps[0].simulation.busy
    assert max(busy) < 1.05 * min(busy)
    assert shared.steps[0].memory[0].logits > whole.steps[0].memory[0].logits == 0
    assert shared.steps[0].recompute_flops < whole.steps[0].recompute_flops, "the head runs once"


def test_sizes_by_hand() -> None:
    config = text(*SHARED, "train.precision=bf16")
    work = planned(config, 2).steps[0].workload
    head = SharedHead.of(config, work)
    assert head is not None
    r = next(r for r in work.rounds if r.loss)
    targets, dim, rows = work.targets_of(r), config.model.dim, config.model.vocab_size // 2
    assert [head.message(kind, r) for kind in (Kind.HEAD_INPUT, Kind.HEAD_GRADIENT)] == [2 * targets * dim] * 2
    assert [head.message(kind, r) for kind in (Kind.STATISTICS, Kind.LOG_SUMS)] == [8 * targets, 4 * targets]
    assert head.rows(0) == rows and head.logits(r, 0) == 2 * targets * rows
    assert SharedHead.of(text("parallel.split_head=true"), work) is None, "one stage has the whole head"

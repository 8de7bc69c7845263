"""Records of the parts of a round."""

from __future__ import annotations

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.distributed.gpus import GPUS
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.state import HARD, Boundary
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.parts import LongRecord, Part, Record
from sleeptrain.plan.roofline.rounds import RoundRecords, in_pieces
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch
from tests.plan.roofline.counted import packed_batch

SMALL = ("experiment=stdlib", "sleep.curriculum=[]", "sleep.window=1000", "model.vocab_size=300")


def part(*more: str) -> Part:
    config = compose([*SMALL, *more])
    batch = packed_batch(2000)
    [r, *_] = rounds = plan_batch(batch, 1000, 1, config.sleep)
    return Part(
        config.model,
        config.train,
        r,
        RoundRecords(config, loop_settings(config.sleep, 1000, len(config.model.layers))).inputs(batch, rounds)[0],
    )


def flops(record: Record) -> tuple[int, int]:
    return tuple(sum(c.flops for c in calls if c.kind is Kind.PRODUCT) for calls in (record.forward, record.backward))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["attention", "sliding_attention", "gated_deltanet", "mamba2", "jet"])
def test_every_mixer_is_counted_and_its_backward_has_twice_the_products(kind: str, precision: str) -> None:
    record = part(f"model.layers=[{kind}]", f"train.precision={precision}").block(0, HARD, False, pairs=0)
    forward, backward = flops(record)
    assert forward > 0 and backward == 2 * forward and record.waits == 0
    assert {c.wide for c in record.forward if c.kind is Kind.PRODUCT} == {precision == "fp32"}
    assert (record.copied > 0) == (precision == "bf16")
    for compile in (False, True):
        assert record.count_forward(GPUS["H100"], compile).total > 0


def test_a_block_of_which_only_the_state_is_read_does_less() -> None:
    whole, state_only = (part("model.layers=[gated_deltanet]").block(0, HARD, only, 0) for only in (False, True))
    assert flops(state_only) < flops(whole)


def test_a_block_reads_the_window_before_under_sliding_eviction() -> None:
    p = part("model.layers=[attention]", "sleep.eviction=sliding")
    hard, sliding = (p.block(0, boundary, False, 0) for boundary in (HARD, Boundary(sliding_window=1000)))
    keys = [sum(c.flops for c in record.forward if c.kind is Kind.ATTENTION) for record in (hard, sliding)]
    assert keys[1] == 2 * keys[0]


def test_parts_of_a_shared_head_do_its_products_together() -> None:
    p = part("train.precision=bf16")
    whole, parts = p.head(keep=True), [p.head_part(VocabularyPart(i, 3), keep=True) for i in range(3)]
    for half in ("forward", "backward"):
        products = [sum(c.flops for c in getattr(r, half) if c.kind is Kind.HEAD) for r in (whole, *parts)]
        assert products[0] == sum(products[1:]) > 0
    assert whole.copied == sum(r.copied for r in parts) and {c.kind for c in parts[0].forward} == {Kind.HEAD, Kind.LOSS}
    ends = p.head_ends(3)
    assert not any(c.flops for c in ends.forward) and ends.count_forward(GPUS["H100"], False).total > 0


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shared", [None, VocabularyPart(0, 2)])
def test_a_long_loss_is_counted_from_its_first_pieces(keep: bool, shared: VocabularyPart | None) -> None:
    p = part(f"model.vocab_size={2**21 if shared is None else 2**20}", "model.dim=32", "train.precision=bf16")

    def record(targets: int | None) -> Record:
        return p.head(keep, targets) if shared is None else p.head_part(shared, keep, targets)

    found, whole = in_pieces(record, 1000, 128), record(None)
    assert isinstance(found, LongRecord) and found.more == 5
    assert (found.copied, found.late) == (whole.copied, whole.late)
    for half in ("count_forward", "count_backward"):
        long, exact = (getattr(r, half)(GPUS["H100"], False) for r in (found, whole))
        assert long.kernels == pytest.approx(exact.kernels) and long.host == pytest.approx(exact.host)
        assert long.total == pytest.approx(exact.total, rel=1e-3)


def test_head_and_embedding() -> None:
    p = part("model.norm_between_passes=true", "train.precision=bf16")
    head = p.head(keep=False)
    [product] = [c for c in head.forward if c.kind is Kind.HEAD]
    assert product.flops == 2 * 1000 * p.model.dim * 300 and head.copied == 300 * p.model.dim
    assert {c.kind for c in p.embedding().forward} >= {Kind.EMBEDDING}
    assert {c.kind for c in p.fed_back().forward} >= {Kind.NORM}

"""The work of rounds: what a GPU runs may not grow unseen."""

from __future__ import annotations

import pytest

from sleeptrain.distributed.gpus import GPUS
from sleeptrain.plan.roofline.kernel_times import SHARES
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.rounds import Parts, all_but_kept, anything, attending_pairs
from sleeptrain.sleep.rounds import Round, Stretch
from tests.plan.roofline.counted import counted_2b

H200 = GPUS["H200"]
# Of a round of the 2B on packed text, one row of 2,048 tokens, forward and backward; a few per cent above the count.
# {round: (kernels of each operator by itself, kernels with compiled blocks, GB, kernels of casts)}
# Casts alone are those of each operator by itself: rotary positions cast two halves, which compiled blocks fuse.
CEILINGS = {"wake": (2550, 1975, 71, 177), "middle": (2465, 1740, 13.1, 173), "last": (2335, 1665, 12.2, 157)}


def round_of(kind: str, keep: bool = True) -> Parts:
    _, workload, batch, records = counted_2b()
    inputs = records.inputs(batch, workload.rounds)
    fits = {
        "wake": lambda r: r.is_wake,
        "middle": lambda r: not r.is_wake and not r.state_only,
        "last": lambda r: r.state_only,
    }[kind]
    return next(records.of(r, i, keep) for r, i in zip(workload.rounds, inputs, strict=True) if fits(r))


@pytest.mark.parametrize("kind", CEILINGS)
def test_a_round_stays_below_its_ceilings(kind: str) -> None:
    """Whoever adds kernels or bytes on purpose raises the ceiling and says why; whoever saves them lowers it."""
    parts, (most, most_compiled, most_bytes, most_casts) = round_of(kind), CEILINGS[kind]
    alone, fused = (parts.forward(H200, c) + parts.backward(H200, c) for c in (False, True))
    found = (alone.launched, fused.launched, sum(alone.bytes.values()) / 1e9, alone.kernels[Kind.CAST])
    assert alone.waits == 0, "the host waits for the GPU"
    for value, ceiling in zip(found, (most, most_compiled, most_bytes, most_casts), strict=True):
        assert 0 < value <= ceiling, f"{found} of {CEILINGS[kind]}"
    assert fused.total <= alone.total and sum(fused.bytes.values()) <= sum(alone.bytes.values())


def test_cuda_graphs_leave_the_loss_to_the_host() -> None:
    """And products of rows that waited, which sleep rounds have."""
    for kind in CEILINGS:
        parts = round_of(kind)
        host = (parts.forward(H200, True) + parts.backward(H200, True)).host
        assert 2 * SHARES.replay <= parts.host_with_graphs(H200) < min(2e-3, host / 4)


def test_selective_recomputation_keeps_products() -> None:
    parts = round_of("wake")
    whole, selected = (parts.again(H200, False, runs) for runs in (anything, all_but_kept))
    assert whole.kernels[Kind.PRODUCT] == parts.forward(H200, False).kernels[Kind.PRODUCT]
    assert not selected.kernels.keys() & {Kind.PRODUCT, Kind.ATTENTION, Kind.RECURRENCE, Kind.HEAD}
    assert selected.kernels[Kind.NORM] == whole.kernels[Kind.NORM]
    assert not {Kind.HEAD, Kind.LOSS} & whole.kernels.keys(), "the loss is no part of what runs again"


def test_a_loss_that_keeps_no_logits_multiplies_once_more() -> None:
    kept, again = (round_of("wake", keep).backward(H200, False) for keep in (True, False))
    assert again.kernels[Kind.HEAD] == kept.kernels[Kind.HEAD] * 3 / 2


def test_only_the_wake_round_reads_embeddings_and_predicts() -> None:
    wake, middle, last = (round_of(kind).forward(H200, False) for kind in CEILINGS)
    assert {Kind.EMBEDDING, Kind.HEAD, Kind.LOSS} <= wake.kernels.keys()
    assert not {Kind.EMBEDDING, Kind.HEAD, Kind.LOSS} & (middle.kernels.keys() | last.kernels.keys())
    assert last.kernels[Kind.ATTENTION] < middle.kernels[Kind.ATTENTION], "the last block is not run"


def test_pairs_are_those_of_documents() -> None:
    r = Round(0, 0, 10, 1, (0, 1))
    assert attending_pairs(r, 10) == 2 * 55 and attending_pairs(r, 2) == 2 * 19
    cut = Round(0, 0, 10, 1, (0,), work=((Stretch(4), Stretch(6)),))
    assert attending_pairs(cut, 10) == 10 + 21

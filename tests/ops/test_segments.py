from __future__ import annotations

import pytest
import torch

from sleeptrain.ops import gated_delta_rule
from sleeptrain.ops.segments import (
    CHUNK,
    cut_at_resets,
    padded_count,
    run_on_segments,
    segment_states,
    segments_of_fixed_size,
)
from tests.ops.cases import delta_inputs, outcome, per_sequence, resets, worst


def test_segments_of_two_rows() -> None:
    reset = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    cut = cut_at_resets(reset)
    assert cut.cu_seqlens.tolist() == [0, 2, 3, 5, 9, 10]
    assert cut.row.tolist() == [0, 0, 0, 1, 1]
    assert cut.continues.tolist() == [False, False, False, True, False]
    assert cut.last_of_row.tolist() == [2, 4]


def test_only_a_segment_that_continues_its_row_gets_the_rows_state() -> None:
    cut = cut_at_resets(torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool))
    states = segment_states(torch.tensor([[5.0], [7.0]]), cut)
    assert states is not None and states.tolist() == [[0.0], [0.0], [7.0], [0.0]]
    assert segment_states(None, cut) is None


@pytest.mark.parametrize("lengths", [[1], [64], [65], [1, 63, 128, 200], [129, 1, 1, 300]], ids=str)
def test_chunks_of_a_segment_follow_each_other(lengths: list[int]) -> None:
    reset = torch.zeros(1, sum(lengths), dtype=torch.bool)
    reset[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    expected = [[i, n] for i, length in enumerate(lengths) for n in range(-(-length // CHUNK))]
    assert cut_at_resets(reset).chunk_indices.tolist() == expected


def test_sizes_of_fixed_size_do_not_tell_where_documents_begin() -> None:
    sizes = set()
    for lengths in ([130], [1] * 6 + [124], [64, 66], [65, 65]):
        reset = torch.zeros(1, 130, dtype=torch.bool)
        reset[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        cut, plain = segments_of_fixed_size(cut_at_resets(reset)), cut_at_resets(reset)
        sizes.add(tuple(t.shape for t in cut))
        assert cut.chunk_indices[: len(plain.chunk_indices)].tolist() == plain.chunk_indices.tolist()
        assert {*map(tuple, cut.chunk_indices[len(plain.chunk_indices) :].tolist())} == {(7, 0)}, "an empty segment"
        assert cut.cu_seqlens[len(plain.row) :].unique().tolist() == [130] and not cut.continues[len(plain.row) :].any()
    assert sizes == {((9,), (8,), (8,), (1,), (2 + 8, 2))}
    assert [padded_count(n) for n in (1, 7, 8, 15, 16)] == [8, 8, 16, 16, 32]


@pytest.mark.parametrize("cut_before", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
def test_rows_cut_at_resets_equal_the_token_loop(with_resets: bool, with_state: bool, cut_before: bool) -> None:
    tensors = delta_inputs(3, 23, 1, 2, 4, 4, dtype=torch.float32)[: 6 if with_state else 5]
    reset = resets(3, 23) if with_resets else None
    segments = cut_at_resets(reset) if cut_before and reset is not None else None
    rule = per_sequence(
        lambda q, k, v, g, beta, S: gated_delta_rule(q, k, v, g, beta, initial_state=S, implementation="reference")
    )

    def cut(*inputs: torch.Tensor):
        return run_on_segments(rule, inputs[:5], inputs[5] if with_state else None, reset, segments)

    def loop(*inputs: torch.Tensor):
        S = inputs[5] if with_state else None
        return gated_delta_rule(*inputs[:5], initial_state=S, reset_BT=reset, implementation="reference")

    assert worst(outcome(cut, tensors), outcome(loop, tensors)) < 1e-5


def test_segments_of_fixed_size_equal_plain_ones() -> None:
    tensors, reset = delta_inputs(2, 23, 1, 2, 4, 4), resets(2, 23)

    def of_one(*x: torch.Tensor):
        if x[0].shape[1]:
            return gated_delta_rule(*x[:5], initial_state=x[5], implementation="reference")
        return x[2], x[5]  # the state is left as it is

    rule = per_sequence(of_one)
    cut = cut_at_resets(reset)
    found, expected = (
        outcome(lambda *x, cut=cut: run_on_segments(rule, x[:5], x[5], reset, cut), tensors)
        for cut in (segments_of_fixed_size(cut), cut)
    )
    assert worst(found, expected) < 1e-12

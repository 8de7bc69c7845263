from __future__ import annotations

import pytest
import torch

from sleeptrain.ops.segments import CHUNK, cut_at_resets, segment_states


def test_segments_of_two_rows() -> None:
    reset = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    cut = cut_at_resets(reset)
    assert cut.cu_seqlens.tolist() == [0, 2, 3, 5, 9, 10]
    assert cut.row.tolist() == [0, 0, 0, 1, 1]
    assert cut.continues.tolist() == [False, False, False, True, False]
    assert cut.last_of_row.tolist() == [2, 4]
    assert cut.cu_seqlens_cpu.tolist() == cut.cu_seqlens.tolist()


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

from __future__ import annotations

import pytest
import torch

from sleeptrain.sleep.graphs.capture import CudaCapture


@pytest.mark.gpu
def test_what_is_recorded_runs_again_on_the_same_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    capture, x, total = CudaCapture(), torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")

    def add() -> None:
        total.add_(x * 2)

    with capture.running():
        add()
        replay = capture.record(add, capture.new_pool())
        assert total.tolist() == [2.0] * 4, "to record runs nothing"
        for value in (1.0, 5.0):
            x.fill_(value)
            replay()
    assert total.tolist() == [2.0 + 2.0 + 10.0] * 4

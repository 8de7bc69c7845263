"""megatron-core on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from sleeptrain.distributed import cpu_shim
from sleeptrain.distributed.cpu_shim import VocabParallelCrossEntropy, install


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back after the test what `install` replaces."""
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    found = VocabParallelCrossEntropy.__dict__["calculate_logits_max"]
    monkeypatch.setattr(VocabParallelCrossEntropy, "calculate_logits_max", found)


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logits_keep_their_width_and_are_at_least_fp32(
    before: torch.dtype, after: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install()
    install()
    assert torch.cuda.current_device() == torch.device("cpu")
    logits = torch.tensor([[1.0, 3.0], [-2.0, -4.0]], dtype=before)
    wide, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert wide.dtype == largest.dtype == after and torch.equal(wide, logits.to(after))
    assert largest.tolist() == [3.0, -2.0]


def test_nothing_changes_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = object()
    monkeypatch.setattr(torch.cuda, "current_device", current)
    cpu_shim.install()
    assert torch.cuda.current_device is current

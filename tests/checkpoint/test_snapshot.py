"""A snapshot does not change with the tensors; the buffer of a GPU's copies is used again."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.checkpoint import snapshot as snapshot_module
from sleeptrain.checkpoint.place import Place, Placed, Slice, Tensors
from sleeptrain.checkpoint.snapshot import Snapshot


def some() -> tuple[Tensors, torch.Tensor]:
    whole = torch.arange(12.0).view(3, 4)
    place = Place(Slice.cut((9,)), 1, 3)
    return {"w": whole, "f": Placed(whole.view(-1)[2:5], place), "i": torch.ones(3, dtype=torch.int64)}, whole


def check(copies: dict[str, Placed], whole: torch.Tensor) -> None:
    whole.fill_(-1)
    assert copies["w"].tensor.tolist() == torch.arange(12.0).view(3, 4).tolist() and copies["w"].place.is_whole
    assert copies["f"].tensor.tolist() == [2, 3, 4] and copies["f"].place.start == 1
    assert copies["i"].tensor.tolist() == [1, 1, 1]


def test_a_step_does_not_change_a_snapshot() -> None:
    tensors, whole = some()
    check(Snapshot().take(tensors), whole)


def test_copies_of_a_gpu_share_one_buffer_which_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU; tests/gpu/test_resume.py saves from one."""
    sizes, waits = list[int](), list[None]()
    monkeypatch.setattr(snapshot_module, "is_on_gpu", lambda tensor: tensor.is_floating_point())
    monkeypatch.setattr(snapshot_module, "pinned", lambda n: sizes.append(n) or torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(snapshot_module, "wait", lambda: waits.append(None))
    snapshot = Snapshot()
    for _ in range(2):
        tensors, whole = some()
        check(snapshot.take(tensors), whole)
    assert sizes == [64] and len(waits) == 2, "12 and 3 numbers, each from an aligned byte on"
    snapshot.take({"w": torch.zeros(100)})
    assert sizes == [64, 400]

from __future__ import annotations

import os

import pytest
import torch

from sleeptrain.errors import DataError
from sleeptrain.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint


def test_round_trip_and_keeping_the_newest(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.arange(step)}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000010.pt"]
    loaded = load_checkpoint(checkpoints(tmp_path)[-1])
    assert loaded["step"] == 10 and torch.equal(loaded["x"], torch.arange(10))


def test_a_write_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert [load_checkpoint(path)["step"] for path in checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_damage_is_named(tmp_path, damage):
    path = save_checkpoint(tmp_path, 1, {"x": torch.zeros(1000)}, keep=1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    else:
        torch.save({"format": 1, "code": os.system}, path)
    with pytest.raises(DataError, match=r"step-00000001.pt cannot be read"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save({"format": 99}, path)
    with pytest.raises(DataError, match="has format 99"):
        load_checkpoint(path)

"""A run that stops and goes on from its checkpoint, on a device, against one that does not stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from tests.gpu.conftest import SLOW_ON_CPU
from tests.train.test_trainer import settings


def losses(folder: Path, place: torch.device, precision: str) -> dict[int, float]:
    """The losses of the steps that the run in this folder makes: all 12, or those after its checkpoint."""
    device = [f"train.device={place.type}", f"train.precision={precision}"]
    heads = ["model.gated_deltanet.head_k_dim=32", "model.gated_deltanet.head_v_dim=32"]
    assert trainer.train(compose(settings(folder, *device, *heads, "checkpoint.keep=9"))) == 0
    return {
        record["step"]: record["loss"] for record in read_metrics(folder / "r" / "metrics.jsonl") if "loss" in record
    }


@pytest.mark.parametrize("place", SLOW_ON_CPU, indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path, place: torch.device, precision: str) -> None:
    """Bit for bit on the CPU; on a GPU sums may be added in another order."""
    whole = losses(tmp_path / "whole", place, precision)
    middle = next(p for p in checkpoints(tmp_path / "whole" / "r" / "checkpoints") if p.name.endswith("6"))
    folder = tmp_path / "stopped" / "r" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(middle, folder / middle.name)
    resumed = losses(tmp_path / "stopped", place, precision)
    assert list(resumed) == [7, 8, 9, 10, 11, 12]
    expected = {step: whole[step] for step in resumed}
    assert resumed == (expected if place.type == "cpu" else pytest.approx(expected, rel=1e-2))

"""How many checkpoints a run keeps, and how large one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.doctor.sizes import checkpoint_bytes, num_kept


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        (["checkpoint.every=500", "checkpoint.keep=2"], 2),  # of 0, 500, .. 2000
        (["checkpoint.every=500", "checkpoint.keep=2", "checkpoint.keep_every=1000"], 3),  # 0, 1500, 2000 and 1000 of
        (["checkpoint.every=0", "checkpoint.keep=5"], 2),
    ],
)
def test_how_many_stay(settings: list[str], number: int) -> None:
    config = compose(["experiment=rule110", "model.vocab_size=3", *settings])
    assert num_kept(config) == number + ("checkpoint.keep_every=1000" in settings)


def test_a_checkpoint_is_as_large_as_one_on_disk(here: Path) -> None:
    """A real run's checkpoint holds weights, momentum and averages. The names of tensors are small."""
    from sleeptrain.train.trainer import train

    settings = ["train.tokens=1", "data.batch=2", "wandb.mode=disabled", "train.device=cpu", "train.eval_every=0"]
    settings += ["data.rule110.validation_samples=2", "run.name=mine"]
    config = compose(["experiment=rule110", *settings])
    train(config)
    config.model.vocab_size = 3
    files = list((here / "runs/mine/checkpoints/step-00000001").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) == pytest.approx(checkpoint_bytes(config), rel=0.05)

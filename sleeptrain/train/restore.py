"""What a checkpoint restores: weights and optimizer state into the engine, and the numbers of the run beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.fit import check_resume
from sleeptrain.checkpoint.folder import read_state
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.state_schema import OF_A_RUN
from sleeptrain.config.schema import ModelConfig
from sleeptrain.health.rollbacks import Rollbacks
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.engine import Engine

RNG = "rng/torch"


@dataclass(frozen=True)
class Restored:
    """Where a run stands; the defaults are those of a run that begins.

    checkpoint: the folder that it was read from. step, tokens, samples, skipped: counts since the run began. shape: the
    curriculum's for the last step. carried: memory of the rows that go on. owes_evaluation: the evaluation of the last
    step was given up when the run was stopped. spikes, data: of `SpikeDetector.state_dict` and `Source.state_dict`.
    """

    checkpoint: Path | None = None
    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    shape: StepShape | None = None
    carried: FastWeights | None = None
    owes_evaluation: bool = False
    rollbacks: Rollbacks = field(default_factory=Rollbacks)
    spikes: Mapping[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None


def restore(checkpoint: Path, engine: Engine, config: ModelConfig) -> Restored:
    """Reads a whole checkpoint, each process for itself; the engine and torch's generator take what is theirs.

    Raises DataError where its tensors do not fit the model.
    """
    saved, files = read_state(checkpoint, OF_A_RUN), TensorFiles(checkpoint)
    check_resume(files.forms, config)
    carried = engine.load(files)
    files.read({RNG: torch.set_rng_state})
    return Restored(
        checkpoint=checkpoint,
        step=saved["step"],
        tokens=saved["tokens"],
        samples=saved["samples"],
        skipped=saved["skipped"],
        shape=StepShape(**saved["shape"]) if saved["shape"] else None,
        carried=carried,
        owes_evaluation=saved["owes_evaluation"],
        rollbacks=Rollbacks(**saved["rollbacks"]),
        spikes=saved["spikes"],
        data=saved["data"],
        wandb_id=saved["wandb_id"],
    )

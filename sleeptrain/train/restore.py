"""Restoring a checkpoint: weights and optimizer state into the engine, and the state of the run (`Restored`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sleeptrain.checkpoint.fit import check_resume
from sleeptrain.checkpoint.folder import read_state
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.state_schema import OF_A_RUN
from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.world import World
from sleeptrain.health.rollbacks import Rollbacks
from sleeptrain.model.state import FastWeights
from sleeptrain.remote import Location
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.engine import Engine

RNG = "rng/torch"


@dataclass(frozen=True)
class Restored:
    """The state of a run, without weights and optimizer state; the defaults are those of a new run.

    checkpoint: the folder that it was read from; None for a new run.
    step, tokens, samples, skipped: counts since the run began.
    flops: model FLOPs since the run began (`StepResult.flops`, of all processes); None if the checkpoint was written by
        a version that did not count them.
    shape: the curriculum's shape of the last step; None for a new run.
    carried: the memory of the rows that go on.
    owes_evaluation: the evaluation of the last step was cancelled when the run was stopped.
    rollbacks: the counts of rollbacks.
    spikes: `SpikeDetector.state_dict`.
    data: `Source.state_dict`.
    wandb_id: the id of the wandb run; None if wandb never ran.
    """

    checkpoint: Location | None = None
    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    flops: int | None = 0
    shape: StepShape | None = None
    carried: FastWeights | None = None
    owes_evaluation: bool = False
    rollbacks: Rollbacks = field(default_factory=Rollbacks)
    spikes: Mapping[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None


def restore(checkpoint: Location, engine: Engine, config: ModelConfig, world: World) -> Restored:
    """Read a whole checkpoint: load the engine and the state of torch's generator, and return the rest.

    All processes call it together. If one fails, all raise; DataError if the tensors do not fit the model.
    """
    files = TensorFiles(checkpoint, world)
    saved, carried = dict[str, Any](), list[FastWeights | None]()

    def check() -> None:
        saved.update(read_state(checkpoint, OF_A_RUN))
        check_resume(files.forms, config)
        torch.set_rng_state(files.tensor(RNG))

    # First all that may fail in one process alone, since processes wait for each other while the engine loads.
    world.all_or_raise(check)
    world.all_or_raise(lambda: carried.append(engine.load(files)))
    return Restored(
        checkpoint=checkpoint,
        step=saved["step"],
        tokens=saved["tokens"],
        samples=saved["samples"],
        skipped=saved["skipped"],
        flops=saved.get("flops"),
        shape=StepShape(**saved["shape"]) if saved["shape"] else None,
        carried=carried[0],
        owes_evaluation=saved["owes_evaluation"],
        rollbacks=Rollbacks(**saved["rollbacks"]),
        spikes=saved["spikes"],
        data=saved["data"],
        wandb_id=saved["wandb_id"],
    )

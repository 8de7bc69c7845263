"""One step: forward, backward and update, with detection and handling of failures."""

from __future__ import annotations

import math
from typing import NamedTuple

from sleeptrain.data.batch import Batch
from sleeptrain.errors import HealthError, NonFiniteError, SpikeError
from sleeptrain.health.norms import Norms
from sleeptrain.optim.freezing import frozen_stage
from sleeptrain.sleep.curriculum import StepShape, stage_shape
from sleeptrain.sleep.precision import proven_precision
from sleeptrain.sleep.step import StepResult
from sleeptrain.sleep.totals import StepTotals
from sleeptrain.train.run_state import Run
from sleeptrain.watch.progress import Phase


class StepFailure(NamedTuple):
    """The failure of a step.

    text: a description that names the step.
    setting: the setting that holds the policy.
    policy: stop | skip | rollback.
    error: the exception for the policy `stop`.
    """

    text: str
    setting: str
    policy: str
    error: type[HealthError]


class StepOutcome(NamedTuple):
    """The result of a step.

    norm: the gradient norm before clipping.
    failure: None if the weights were updated.
    """

    result: StepResult
    norm: float
    failure: StepFailure | None


def try_step(
    run: Run, batch: Batch, totals: StepTotals, shape: StepShape, scale: float, norms: Norms | None
) -> StepOutcome:
    """Run forward and backward, clip, and update at `scale` times the peak rates.

    All processes return the same failure.
    """
    result = _gradient(run, batch, totals, shape, norms)
    run.progress.begin(Phase.UPDATE)
    spikes, spike = run.spikes, list[str]()
    stage = stage_shape(run.config, run.tokens)
    spikes.begin([stage.passes, stage.window, stage.batch, frozen_stage(run.config.optim, run.tokens)])

    def accepts(norm: float) -> bool:
        """True if the step is no spike. The first process decides, since rounding may differ between processes."""
        description = spikes.spike(result.loss, norm) if run.world.is_main else None
        if not run.world.any(description is not None):
            return True
        spike.append(run.world.from_first(description) or "")
        return False

    finite = math.isfinite(result.loss)
    norm = run.engine.step(scale, accepts if spikes.watches else None) if finite else math.nan
    if not math.isfinite(norm):
        return StepOutcome(result, norm, _nonfinite(run, batch, shape, result.loss, norm))
    spikes.observe(result.loss, norm)
    if spike:
        text = f"step {run.step + 1}: {spike[0]}"
        return StepOutcome(result, norm, StepFailure(text, "health.on_spike", run.config.health.on_spike, SpikeError))
    return StepOutcome(result, norm, None)


def _gradient(run: Run, batch: Batch, totals: StepTotals, shape: StepShape, norms: Norms | None) -> StepResult:
    """Compute the gradient of the step. The first step of an attempt also proves its precision, before an update."""
    on_features = None if norms is None else norms.on_features
    if run.precision_proven:
        return run.engine.forward_backward(batch, shape, run.carried, on_features, totals)
    with proven_precision(run.config, run.world, run.message):
        result = run.engine.forward_backward(batch, shape, run.carried, on_features, totals)
    run.precision_proven = True
    return result


def _nonfinite(run: Run, batch: Batch, shape: StepShape, loss: float, norm: float) -> StepFailure:
    run.progress.begin(Phase.LOCATING)
    where = run.engine.locate_nonfinite(batch, shape, run.carried)
    text = f"step {run.step + 1}: loss {loss}, gradient norm {norm}; {where}"
    return StepFailure(text, "health.on_nonfinite", run.config.health.on_nonfinite, NonFiniteError)


def handle_failure(run: Run, failure: StepFailure) -> bool:
    """Follow the policy of a failure. Returns True if the step is skipped: it counts, but without an update.

    Returns False if the run has gone back to a checkpoint. Raises the failure's error if the run is to stop.
    """
    if failure.policy == "skip":
        run.skipped += 1
        run.message(f"skipped {failure.text} ({run.skipped} skipped so far)")
        return True
    if failure.policy == "stop":
        raise failure.error(
            f"{failure.text}. The last checkpoint is whole; {failure.setting}=skip passes over such steps, "
            f"{failure.setting}=rollback goes back to a checkpoint and on with other data"
        )
    rollbacks = run.rollbacks
    if rollbacks.in_vain >= run.config.health.max_rollbacks:
        raise failure.error(
            f"{failure.text}. {rollbacks.in_vain} rollbacks (health.max_rollbacks) have not brought the run past step "
            f"{rollbacks.furthest}: lower the rates or look at the data; the last checkpoint is whole"
        )
    run.roll_back(failure.text)
    return False

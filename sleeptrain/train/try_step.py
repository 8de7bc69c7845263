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
from sleeptrain.sleep.totals import StepTotals, exchange_results
from sleeptrain.train.run_state import Run
from sleeptrain.train.step_feed import StepInputs
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


class _Exchanged(NamedTuple):
    """What the step's one exchange tells all processes. spike: a message if the step is one."""

    result: StepResult
    norm: float
    following: StepTotals
    spike: str | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.result.loss) and math.isfinite(self.norm)


def try_step(run: Run, inputs: StepInputs, shape: StepShape, scale: float, norms: Norms | None) -> StepOutcome:
    """Run forward and backward, clip, and update at `scale` times the peak rates.

    All processes return the same failure. They exchange what they must know of this step and of the next one once: when
    the gradient norm is known, right before the update. The processes have just waited for each other in the sum of
    the norm, and the exchange can still prevent the update.
    """
    part = _gradient(run, inputs, shape, norms)
    run.progress.begin(Phase.UPDATE)
    stage = stage_shape(run.config, run.tokens)
    run.spikes.begin([stage.passes, stage.window, stage.batch, frozen_stage(run.config.optim, run.tokens)])
    exchanged: list[_Exchanged] = []

    def accepts(norm: float) -> bool:
        """True if the step is finite and no spike: the same in all processes, which decide by equal numbers."""
        exchanged.append(_exchange(run, part, norm))
        return exchanged[0].finite and exchanged[0].spike is None

    norm = run.engine.step(scale, accepts)
    if not exchanged:  # the norm is not finite
        exchanged.append(_exchange(run, part, norm))
    done = exchanged[0]
    run.feed.agree_on(done.following)
    if not done.finite:
        failure = _nonfinite(run, inputs.batch, shape, done.result.loss, done.norm)
        return StepOutcome(done.result, done.norm, failure)
    run.spikes.observe(done.result.loss, done.norm)
    if done.spike is None:
        return StepOutcome(done.result, done.norm, None)
    text = f"step {run.step + 1}: {done.spike}"
    failure = StepFailure(text, "health.on_spike", run.config.health.on_spike, SpikeError)
    return StepOutcome(done.result, done.norm, failure)


def _exchange(run: Run, part: StepResult, norm: float) -> _Exchanged:
    result, norm, following = exchange_results(run.world, part, norm, run.feed.facts())
    spike = run.spikes.spike(result.loss, norm) if math.isfinite(result.loss) and math.isfinite(norm) else None
    return _Exchanged(result, norm, following, spike)


def _gradient(run: Run, inputs: StepInputs, shape: StepShape, norms: Norms | None) -> StepResult:
    """Compute the gradient of the step. The first step of an attempt also proves its precision, before an update."""
    batch, totals, plans = inputs
    on_features = None if norms is None else norms.on_features
    if run.precision_proven:
        return run.engine.forward_backward(batch, shape, run.carried, on_features, totals, plans)
    with proven_precision(run.config, run.world, run.message):
        result = run.engine.forward_backward(batch, shape, run.carried, on_features, totals, plans)
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

"""The training job: from a configuration to a trained model, through any number of stops and starts."""

from __future__ import annotations

import math

from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.errors import NonFiniteError
from sleeptrain.parallel.launch import join
from sleeptrain.parallel.layout_check import too_few_sequences
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.stop import Stopped, leads, listening
from sleeptrain.train.evaluate import Evaluation, EvaluationStopped, evaluate
from sleeptrain.train.lr import lr_scale
from sleeptrain.train.pace import Pace
from sleeptrain.train.run import Run
from sleeptrain.train.status import State, Status
from sleeptrain.train.step import StepResult
from sleeptrain.train.stopping import Stopping
from sleeptrain.watch.watch import watched
from sleeptrain.watch.whereabouts import Phase


def train(config: Config) -> int:
    """Trains until `train.tokens` are seen, a signal asks to stop or the time is over; the same call goes on.

    Returns the exit code 0. Raises Stopped where the run was stopped, once everything is saved; ConfigError and
    DataError before anything is written; NonFiniteError when a loss or gradient is not finite and
    `train.nonfinite=stop`; CheckpointError where the last checkpoint could not be written.
    """
    status = Status(run_folder(config), leads())
    with listening() as request, status.kept():
        world = join(config)
        stopping = Stopping(config.train.max_time, request, world)
        with watched(config, world, lambda alarm: status.end(State.FAILED, alarm.text, alarm.code)) as whereabouts:
            finished = not stopping.agreed() and train_watched(Run(config, world, whereabouts, stopping, status))
        if finished:
            status.end(State.FINISHED)
        else:
            status.end(State.STOPPED, stopping.reason)
        world.close()
        if not finished:
            raise Stopped
    return 0


def train_watched(run: Run) -> bool:
    """The run from where it stands; whether it has come to its end."""
    run.open()
    try:
        train_steps(run)
    except Exception:
        run.saver.wait()  # a checkpoint under way is worth it, whatever has happened since
        raise
    finally:
        run.close()
    return run.finished


def train_steps(run: Run) -> None:
    """What is left to do, or that until the run is stopped; then everything is saved."""
    config, stopping = run.config, run.stopping
    stopping.start()
    if run.finished:
        run.message(f"{run.folder} is complete: {run.step} steps, {run.tokens} tokens")
    if warning := too_few_sequences(config, run.world.part.ranks):
        run.message(f"warning: {warning}")
    if limit := stopping.limit_line():
        run.message(limit)
    if run.owed is not None:
        hold_evaluation(run, run.owed)
    pace = Pace(run.device)
    while not run.done and not stopping.agreed():
        shape = step_shape(config, run.tokens, run.step)
        if (read := run.next_batch(shape.batch)) is None:
            continue  # it is agreed upon, then
        batch, num_tokens = read
        # The rate of the step's middle: neither a first nor a last step at rate 0.
        scale = lr_scale(run.tokens + num_tokens // 2, config.train.tokens, config.optim)
        result, norm = train_step(run, batch, shape, scale)
        run.advance(batch, num_tokens, result.state)
        pace.count(num_tokens, result)
        if due(run, config.train.log_every):
            run.log(step_record(run, shape, result, norm, scale) | pace.take(config.train.tokens - run.tokens))
        if run.done or due(run, config.train.eval_every):
            hold_evaluation(run, shape)
            pace.restart()
        if run.done or due(run, config.checkpoint.every):
            run.save()
    if not run.finished:
        run.save()
    run.whereabouts.begin(Phase.SAVING)
    run.saver.finish()
    if not run.finished:
        run.message(f"{stopping.reason}: saved at step {run.step}; the same command goes on")


def train_step(run: Run, batch: Batch, shape: StepShape, scale: float) -> tuple[StepResult, float]:
    """Forward, backward, clip, update. A step that is not finite leaves the weights as they are."""
    result = run.engine.forward_backward(batch, shape, run.carried)
    run.whereabouts.begin(Phase.UPDATE)
    norm = run.engine.step(scale) if math.isfinite(result.loss) else math.nan
    if math.isfinite(norm):
        return result, norm
    run.whereabouts.begin(Phase.LOCATING)
    where = run.engine.locate_nonfinite(batch, shape, run.carried)
    text = f"step {run.step + 1}: loss {result.loss}, gradient norm {norm}; {where}"
    if run.config.train.nonfinite == "stop":
        raise NonFiniteError(f"{text}. The last checkpoint is whole; train.nonfinite=skip passes over such steps")
    run.skipped += 1
    run.message(f"skipped {text} ({run.skipped} skipped so far)")
    return StepResult(result.loss, run.model.empty_state(), result.num_rounds, result.flops), norm


def step_record(run: Run, shape: StepShape, result: StepResult, norm: float, scale: float) -> dict[str, object]:
    return {
        "loss": result.loss,
        "lr": run.config.optim.muon_lr * scale,
        "grad_norm": norm,
        "passes": shape.passes,
        "window": shape.window,
        "batch": shape.batch,
        "skipped": run.skipped,
        "failed_saves": run.saver.failures,
        "data": run.source.report(),
    }


def hold_evaluation(run: Run, shape: StepShape) -> None:
    """Evaluates after a step of this shape; where the run is stopped meanwhile, that is owed by the next attempt."""
    run.owed = shape
    try:
        found = evaluation(run, shape)
    except EvaluationStopped:
        return
    run.log({"eval": found})
    run.owed = None


def evaluation(run: Run, shape: StepShape) -> Evaluation:
    """Held-out loss at this step's window, with the configured number of passes and with one."""
    config = run.config
    run.whereabouts.begin(Phase.EVALUATION)
    rows = min(shape.batch, 8) if config.data.source == "shards" else shape.batch
    count = config.train.eval_batches
    sets = {name: run.source.validation_batches(name, rows, count) for name in run.source.held_out}
    passes = sorted({1, shape.passes})
    # Only where the model's end is held are losses and answers known; all are told of them.
    counts = config.data.source == "rule110" and run.model.layers.stop == run.model.num_layers
    found = evaluate(
        run.model, sets, config, shape.window, passes, counts, run.engine.window_losses, run.stopping.agreed
    )
    return run.world.from_last(found)


def due(run: Run, every: int) -> bool:
    return every > 0 and run.step % every == 0

"""The training job: from a configuration to a trained model, through any number of stops and starts."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from sleeptrain.config.paths import naming_settings
from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.distributed.launch import Place, find_place, join
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError, DivergedError, RefusedByAllError
from sleeptrain.health.norms import Norms
from sleeptrain.health.replicas import compare_replicas, holds_copies
from sleeptrain.health.speed import gathered_speeds
from sleeptrain.model.compiled import compile_clock, naming_compilation
from sleeptrain.optim.freezing import frozen_stage
from sleeptrain.optim.lr_schedule import lr_scale
from sleeptrain.parallel.layout_check import check_layout, too_few_micro_batches
from sleeptrain.plan.expected import expected_cost
from sleeptrain.sleep.curriculum import StepShape, stage_shape, step_shape
from sleeptrain.sleep.step import StepResult
from sleeptrain.stop import Stopped, is_main, listening
from sleeptrain.terminal import say
from sleeptrain.train.evaluate import Evaluation, EvaluationStopped, Share, evaluate, held_out
from sleeptrain.train.open_run import open_run
from sleeptrain.train.pace import Pace
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import State, Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.train.try_step import handle_failure, try_step
from sleeptrain.watch.heartbeat import Alarm
from sleeptrain.watch.progress import Phase, Progress
from sleeptrain.watch.watch import watched


def train(config: Config) -> int:
    """Train until `train.tokens` are seen, a signal arrives or the time is over. Another call resumes the run.

    Returns the exit code 0. Raises Stopped if the run was stopped, after it is saved; ConfigError and DataError before
    anything is written; LeaseError if another process has the run or has taken it over; NonFiniteError and SpikeError
    if a step fails and the run is to stop or cannot go back; DivergedError if replicas no longer hold the same weights;
    CheckpointError if the last checkpoint could not be written; MeetingError if the run's processes have not met.
    """
    status = Status(run_folder(config), is_main())

    def ends(alarm: Alarm) -> None:
        status.end(State.FAILED, alarm.text, alarm.code)
        status.lease.release()

    with status.lease, listening() as request, status.recorded():
        try:
            refuse_layout(config, find_place(os.environ))
            world = join(config, request)
        except Stopped:
            end_early(status, request.signal_name)
            raise
        stopping = Stopping(config.train.max_time, request, world)
        if stopping.skew and world.is_main:
            say_early(f"warning: {stopping.skew}")
        with watched(config, world, ends) as progress:
            early = stopping.agreed()
            finished = not early and train_watched(config, world, progress, stopping, status)
        if early:
            end_early(status, stopping.reason)
        else:
            status.end(State.FINISHED if finished else State.STOPPED, None if finished else stopping.reason)
        world.close()
        if not finished:
            raise Stopped
    return 0


def refuse_layout(config: Config, place: Place) -> None:
    """Raise ConfigError if the layout does not fit. All processes find that, and only the main process says it."""
    try:
        check_layout(config, place.size)
    except ConfigError as error:
        if place.rank == 0:
            raise
        raise RefusedByAllError(str(error)) from error


def end_early(status: Status, reason: str | None) -> None:
    """Write and print the end of a run that is stopped before it was opened."""
    status.end(State.STOPPED, reason)
    if status.writes:
        say_early(f"{reason}: stopped before the run was opened; the same command starts it again")


def say_early(line: str) -> None:
    """Print a line before the run is opened; an open run prints through `Run.message`."""
    say(f"sleeptrain: {line}", sys.stderr, flush=True)


def train_watched(config: Config, world: World, progress: Progress, stopping: Stopping, status: Status) -> bool:
    """Open the run and train it on; True if it has come to its end."""
    with naming_settings(config):
        run = open_run(config, world, progress, stopping, status)
    if run is None:
        stopping.agreed()  # sets the reason in all processes
        return False
    try:
        with naming_compilation() if config.train.compile else nullcontext():
            train_steps(run)
    except Exception:
        run.saver.wait()  # let a checkpoint be finished that is being written
        raise
    finally:
        run.close()
    return run.finished


def train_steps(run: Run) -> None:
    """Train the remaining steps, or until the run is stopped; then save the run."""
    config, stopping = run.config, run.stopping
    stopping.start()
    if run.finished:
        run.message(f"{run.folder} is complete: {run.step} steps, {run.tokens} tokens")
    if run.world.is_main and run.step == 0 and not run.finished:
        run.message(expected_cost(config))
    if warning := too_few_micro_batches(config, run.world.part.ranks):
        run.message(f"warning: {warning}")
    if line := run.recompute.line():
        run.message(line)
    if config.health.compare_every and config.parallel.zero == 3 and run.world.mesh.data.size > 1:
        run.message("health.compare_every: under parallel.zero=3 nobody holds a copy of weights, so none are compared")
    if config.train.compile and not run.finished:
        run.message("train.compile: the first step compiles each kind of block, which takes a while")
    if limit := stopping.limit_line():
        run.message(limit)
    if run.owes_evaluation:
        hold_evaluation(run)
    pace = Pace(run.device)
    while not run.done and stopping.reason is None:
        if not one_step(run, pace):
            pace.restart()
            continue
        check_processes(run)
        if run.done or due(run.step, config.checkpoint.every):
            save(run)
    if not run.finished:
        save(run)
    run.progress.begin(Phase.SAVING)
    run.finish_saving()
    if not run.finished:
        run.message(f"{stopping.reason}: saved at step {run.step}; the same command goes on")


def one_step(run: Run, pace: Pace) -> bool:
    """Run a step and log it; False if the run went back to a checkpoint, or is stopped before the step."""
    config = run.config
    shape = step_shape(config, run.tokens, run.step)
    if (found := run.next_batch(shape)) is None:
        return False
    num_tokens = found.totals.tokens
    run.read_ahead(num_tokens)
    # The learning rate at the middle of the step, so that neither the first nor the last step has rate 0.
    scale = lr_scale(run.tokens + num_tokens // 2, config.train.tokens, config.optim)
    norms = Norms(run.progress) if due(run.step + 1, config.health.norms_every) else None
    run.engine.freeze(frozen_stage(config.optim, run.tokens))
    run.engine.recompute(run.recompute.at(run.tokens))
    result, norm, failure = try_step(run, found, shape, scale, norms)
    if config.train.compile and (compiled := compile_clock().take()):
        run.message(f"step {run.step + 1}: {compiled}")
    if run.engine.graphs is not None and (recorded := run.engine.graphs.take()):
        run.message(f"step {run.step + 1}: {recorded}")
    if failure is not None and not handle_failure(run, failure):
        return False
    run.shape = stage_shape(config, run.tokens)
    state = result.state if failure is None else run.model.empty_state()
    run.advance(found.batch, num_tokens, result.flops, state)
    if failure is None:
        run.rollbacks.made(run.step)
    pace.count(num_tokens, result)
    if due(run.step, config.train.log_every):
        run.log(step_record(run, shape, result, norm, scale) | pace.take(config.train.tokens - run.tokens))
    if norms is not None:
        run.log({"norms": norms.record(result.state, shape.passes, run.world)})
    if run.done or due(run.step, config.train.eval_every):
        hold_evaluation(run)
        pace.restart()
    return True


def step_record(run: Run, shape: StepShape, result: StepResult, norm: float, scale: float) -> dict[str, object]:
    return {
        "loss": result.loss,
        "lr": run.config.optim.muon_lr * scale,
        "grad_norm": norm,
        "passes": shape.passes,
        "window": shape.window,
        "batch": shape.batch,
        "skipped": run.skipped,
        "rollbacks": run.rollbacks.total,
        "failed_saves": run.saver.failures,
        "data": run.feed.report(),
    }


def hold_evaluation(run: Run) -> None:
    """Evaluate and log; if the run is stopped meanwhile, the next attempt owes this evaluation."""
    run.owes_evaluation = True
    try:
        result = evaluation(run)
    except EvaluationStopped:
        return
    run.log({"eval": result})
    run.owes_evaluation = False


def evaluation(run: Run) -> Evaluation:
    """Evaluate at the last step's window, with the curriculum's number of passes and with one pass."""
    assert run.shape is not None
    config, shape = run.config, run.shape
    run.progress.begin(Phase.EVALUATION)
    result = evaluate(
        run.model,
        held_out(run.source, config),
        config,
        shape.window,
        sorted({1, shape.passes}),
        run.source.task,
        run.engine,
        run.stopping.agreed,
        evaluation_share(config, run.world),
    )
    return run.world.from_last(result)


def evaluation_share(config: Config, world: World) -> Share:
    """The held-out batches that this replica runs.

    The last process of a replica's tensor ranks, on the last stage, has its losses and predictions.
    """
    mesh = world.mesh
    knows = mesh.pipeline.rank == mesh.pipeline.size - 1 and mesh.tensor.rank == mesh.tensor.size - 1
    return Share(mesh.data.rank, mesh.data.size, knows, config.parallel.zero == 3, world.total)


def save(run: Run) -> None:
    """Save a checkpoint, after a check that all replicas hold the same weights. Raises DivergedError."""
    if run.config.health.compare_every and not due(run.step, run.config.health.compare_every):
        compare_weights(run)
    run.save()


def check_processes(run: Run) -> None:
    """Compare the processes' weights and speeds if that is due. Raises DivergedError."""
    health = run.config.health
    run.progress.begin(Phase.CHECKS)
    if due(run.step, health.compare_every):
        compare_weights(run)
    if run.world.size > 1 and due(run.step, health.probe_every):
        record, lines = gathered_speeds(run.world, health.slow_factor)
        run.log({"speed": record})
        for line in lines:
            run.message(f"step {run.step}: {line}")


def compare_weights(run: Run) -> None:
    """Raise DivergedError if replicas hold copies of the weights and the copies differ."""
    if not holds_copies(run.config, run.world):
        return
    try:
        compare_replicas(run.model, run.world)
    except DivergedError as error:
        raise DivergedError(
            f"step {run.step}: {error}. The step is not saved: the same command goes on from the last checkpoint, in "
            "which all were equal; leave out the machine of a rank that differs again"
        ) from None


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

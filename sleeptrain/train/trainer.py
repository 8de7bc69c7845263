"""The training job: from a configuration to a trained model, through any number of stops and starts."""

from __future__ import annotations

import math

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.errors import NonFiniteError
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.train.evaluate import Evaluation, evaluate
from sleeptrain.train.health import locate_nonfinite
from sleeptrain.train.lr import lr_scale
from sleeptrain.train.pace import Pace
from sleeptrain.train.run import Run
from sleeptrain.train.step import StepResult, forward_backward
from sleeptrain.train.stop import Stopped, StopRequest


def train(config: Config) -> int:
    """Trains until `train.tokens` are seen or a signal asks to stop; the same call goes on from where it stopped.

    Returns the exit code 0. Raises Stopped after a signal, once everything is saved; ConfigError and DataError before
    anything is written; NonFiniteError when a loss or gradient is not finite and `train.nonfinite=stop`.
    """
    with StopRequest() as stop:
        run = Run(config).open()
        try:
            if run.done:
                run.progress.message(f"{run.folder} is complete: {run.step} steps, {run.tokens} tokens")
            pace = Pace(run.device)
            while not run.done and not stop.requested:
                shape = step_shape(config, run.tokens, run.step)
                batch = run.source.batch(shape.batch)
                num_tokens = int((batch.documents_BT != PAD).sum())
                # The rate of the step's middle: neither a first nor a last step at rate 0.
                scale = lr_scale(run.tokens + num_tokens // 2, config.train.tokens, config.optim)
                result, norm = train_step(run, batch, shape, scale)
                run.advance(batch, num_tokens, result.state)
                pace.count(num_tokens, result)
                if due(run, config.train.log_every):
                    run.log(step_record(run, shape, result, norm, scale) | pace.take(config.train.tokens - run.tokens))
                if run.done or due(run, config.train.eval_every):
                    run.log({"eval": evaluation(run, shape)})
                    pace.restart()
                if run.done or due(run, config.train.checkpoint_every):
                    run.save()
            if not run.done:
                run.save()
                run.progress.message(f"{stop.signal_name}: saved at step {run.step}; the same command goes on")
                raise Stopped(0)
        finally:
            run.close()
    return 0


def train_step(run: Run, batch: Batch, shape: StepShape, scale: float) -> tuple[StepResult, float]:
    """Forward, backward, clip, update. A step that is not finite leaves the weights as they are."""
    run.optim.zero_grad()
    result = forward_backward(run.model, batch, shape, run.config, run.carried)
    norm = float(run.optim.clip(run.config.optim.clip_norm))
    if math.isfinite(result.loss) and math.isfinite(norm):
        run.optim.step(scale)
        return result, norm
    where = locate_nonfinite(run.model, batch, shape, run.config, run.carried)
    text = f"step {run.step + 1}: loss {result.loss}, gradient norm {norm}; first seen at {where}"
    if run.config.train.nonfinite == "stop":
        raise NonFiniteError(f"{text}. The last checkpoint is whole; train.nonfinite=skip passes over such steps")
    run.skipped += 1
    run.progress.message(f"skipped {text} ({run.skipped} skipped so far)")
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
        "data": run.source.report(),
    }


def evaluation(run: Run, shape: StepShape) -> Evaluation:
    """Held-out loss at this step's window, with the configured number of passes and with one."""
    config = run.config
    rows = min(shape.batch, 8) if config.data.source == "shards" else shape.batch
    count = config.train.eval_batches
    sets = {name: run.source.validation_batches(name, rows, count) for name in run.source.held_out}
    passes = sorted({1, shape.passes})
    return evaluate(run.model, sets, config, shape.window, passes, config.data.source == "rule110")


def due(run: Run, every: int) -> bool:
    return every > 0 and run.step % every == 0

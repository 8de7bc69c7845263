"""The functions of `import sleeptrain`: a model, its loss on rows, a plan, a run and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.folder import CONFIG, read_state
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.weights import load_weights
from sleeptrain.commands.evaluate import evaluate_opened, open_checkpoint
from sleeptrain.config import load_resolved
from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks import build
from sleeptrain.data.tasks.task import Task
from sleeptrain.distributed.gpus import find_gpu
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.plan import layout
from sleeptrain.plan.layout import Plan
from sleeptrain.remote import named_place
from sleeptrain.sleep.curriculum import last_shape
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.train.trainer import train


def build_model(config: Config) -> Hybrid:
    """The model of `config.model` with initial weights, fp32, on the CPU.

    The weights are those with which a run of the same `train.seed` begins. `model.vocab_size=0` takes the vocabulary of
    the data, for which shards must exist. Raises ConfigError: no such data, or a vocabulary that is too small.
    """
    model = Hybrid(with_vocabulary(config, config.model.vocab_size or layout.vocabulary(config)).model)
    model.init_weights(config.train.seed)
    return model


def build_task(config: Config) -> Task:
    """The task that `data.source` names (rule110, depo or gsm_infinite), from the settings of that name.

    `task.rows(seed, first, count)` gives training rows as a `Batch`, `task.held_out(first, count)` held-out ones.
    Raises ConfigError: `data.source` is no task.
    """
    return build.build_task(config.data)


def mean_loss(model: Hybrid, batch: Batch, config: Config, passes: int | None = None) -> torch.Tensor:
    """The mean cross entropy of a batch's targets in nats, a scalar with its gradient, as a training step computes it.

    batch: B rows of T tokens on the CPU. They are read from an empty memory in windows of `sleep.window` tokens; which
    windows sleep is `sleep.when`, how often is `passes`, or else `sleep.passes`. A curriculum is not read. Nothing is
    recomputed in the backward. Raises ConfigError: a stop rule is set, or rows go on from the step before, whose memory
    is not here.
    """
    if config.sleep.stop != "fixed":
        raise ConfigError(
            f"sleep.stop={config.sleep.stop}: mean_loss runs a fixed number of passes; set sleep.stop=fixed"
        )
    if batch.carried_B.any():
        raise ConfigError("batch.carried_B: a row goes on from the step before, whose memory mean_loss does not have")
    sleep = config.sleep
    rounds = plan_batch(batch, sleep.window, sleep.passes if passes is None else passes, sleep)
    settings = loop_settings(sleep, sleep.window, model.num_layers, recompute="none")
    losses, _ = run_rounds(model, batch, rounds, model.empty_state(), settings)
    return torch.stack(list(losses.values())).sum() / (batch.targets_BT != IGNORE).sum()


def make_plan(config: Config, processes: int = 1, gpu: str | None = None, efficiency: float | None = None) -> Plan:
    """What a run on `processes` processes needs and costs: memory, traffic, and with `gpu` its time. Runs nothing.

    gpu: the name of a GPU whose data sheet is known, such as "H200". efficiency: the share of the GPU's peak FLOP/s
    that the run reaches, 0 to 1; None counts it from the operators of its rounds. Raises ConfigError: the layout does
    not fit, the GPU is unknown, or neither the model nor the data give a vocabulary.
    """
    return layout.make_plan(config, processes, None if gpu is None else find_gpu(gpu), efficiency)


def run_training(config: Config) -> Path:
    """Train in this process until `train.tokens` are seen, or go on with the run that is there. Returns its folder.

    A signal, or the end of `train.max_time`, saves the run and ends the process with exit code 75 (SystemExit). Raises
    ConfigError: `parallel.tensor` or `parallel.pipeline` ask for several processes, which the command line starts; and
    all that `sleeptrain.train.trainer.train` raises.
    """
    train(config)
    return run_folder(config)


def load_checkpoint(place: str | Path, allow_older: bool = False) -> tuple[Hybrid, Config]:
    """The model of a checkpoint, or of a run's newest one, fp32 on the CPU, and its settings.

    `sleep.passes` and `sleep.window` of the settings are N and L of the curriculum at the checkpoint. place: a folder
    or the URL of an object store. allow_older: where the newest checkpoint of the run is damaged, take the newest whole
    one. Raises DataError: there is none, or it is damaged.
    """
    world = World(Mesh.single(), torch.device("cpu"))
    checkpoint = named_checkpoint(named_place(str(place)), world, allow_older=allow_older)
    config = load_resolved(checkpoint / CONFIG)
    shape = last_shape(config, read_state(checkpoint))
    model = load_weights(config.model, TensorFiles(checkpoint))
    sleep = replace(config.sleep, passes=shape.passes, window=shape.window, curriculum=[])
    return model, replace(config, sleep=sleep)


def evaluate_checkpoint(
    place: str | Path, passes: Sequence[int] | None = None, batches: int | None = None
) -> dict[str, Any]:
    """Held-out loss and accuracy of a checkpoint, or of a run's newest one, with each number of passes.

    Returns {"checkpoint", "step", "tokens", "window", "eval"} as `sleeptrain evaluate --json` prints it. passes: None
    is 1 and N of the checkpoint. batches: None is `train.eval_batches` of the run. Raises DataError: the checkpoint or
    the run's data are missing or damaged; ConfigError: a number that cannot be.
    """
    return evaluate_opened(open_checkpoint(named_place(str(place)), passes, batches=batches))

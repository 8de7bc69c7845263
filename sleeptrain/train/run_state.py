"""The state of an open run (`open_run`), with its checkpoints and rollbacks."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from typing import Any

import torch

from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.folder import CHECKPOINTS, CONFIG, STATE, checkpoint_folder
from sleeptrain.checkpoint.keep import remove_after
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.vocabulary import TOKENIZER
from sleeptrain.config.resolved import resolved_yaml, run_folder
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.data.source import Source
from sleeptrain.distributed.launch import shared_reading
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError, HealthError
from sleeptrain.health.rollbacks import reach
from sleeptrain.health.spikes import SpikeDetector
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.train.engine import Engine
from sleeptrain.train.logging.metrics import position
from sleeptrain.train.recompute import RecomputeStages
from sleeptrain.train.restore import RNG, Restored, restore
from sleeptrain.train.run_log import RunLog
from sleeptrain.train.status import Status
from sleeptrain.train.step_feed import StepFeed, StepInputs
from sleeptrain.train.stopping import Stopping
from sleeptrain.watch.progress import Phase, Progress


class Run:
    """Model, optimizers, data, position and records of a run; in each process, its part of them.

    config: the configuration, with the vocabulary of the data.
    world: the processes of the run.
    progress: the progress of this process, which the run updates.
    stopping: decides when the run stops early.
    status: the status file, with the lease on the folder, which the main process holds.
    source: the data, at the position of `restored`. feed: the inputs of steps, from it.
    engine: the engine, with the weights of `restored`.
    records: the records, which the main process writes.
    restored: the state that the run starts from.
    recompute: the recomputation mode of each stage.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        progress: Progress,
        stopping: Stopping,
        status: Status,
        source: Source,
        engine: Engine,
        records: RunLog,
        restored: Restored,
        recompute: RecomputeStages,
    ) -> None:
        self.config, self.world, self.progress = config, world, progress
        self.stopping, self.status, self.lease = stopping, status, status.lease
        self.source, self.engine, self.records, self.recompute = source, engine, records, recompute
        self.feed = StepFeed(config, world, source, shared_reading(source, world), engine, stopping)
        self.folder = run_folder(config)
        self._resolved = resolved_yaml(config)
        self.pointer = self.folder / CHECKPOINTS
        saved, settings = checkpoint_folder(config), config.checkpoint
        self.saver = Saver(saved, world, settings, self.message, reach(config.health), self.pointer)
        self.spikes = SpikeDetector(config.health.spike_factor, config.health.spike_window)
        self.rollbacks = restored.rollbacks
        self.owes_evaluation = restored.owes_evaluation
        self.precision_proven = False  # the first step of this attempt proves it
        # Record times are monotonic: a change of the system clock does not move them.
        self._date = time.time() - time.monotonic()
        self._set_state(restored)

    def _set_state(self, restored: Restored) -> None:
        self.step, self.tokens, self.samples = restored.step, restored.tokens, restored.samples
        self.skipped, self.flops = restored.skipped, restored.flops
        self.shape, self.carried = restored.shape, restored.carried
        if restored.spikes is not None:
            self.spikes.load_state_dict(restored.spikes)
        if restored.checkpoint is not None:
            self.saver.newest = restored.step

    @property
    def model(self) -> Hybrid:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def done(self) -> bool:
        """All steps are done."""
        return self.tokens >= self.config.train.tokens

    @property
    def finished(self) -> bool:
        """All steps are done, and their evaluations too."""
        return self.done and not self.owes_evaluation

    def close(self) -> None:
        self.records.close()

    def next_batch(self, shape: StepShape) -> StepInputs | None:
        """The inputs of the next step, whose batch has `shape.batch` rows in all.

        None if some process is to stop, which sets `stopping.reason`, or was cancelled while it waited for data; then
        the data's position is unchanged in all processes.
        """
        self.progress.begin_step(self.step + 1)
        return self.feed.take(shape)

    def read_ahead(self, num_tokens: int) -> None:
        """Read the batch of the step after the current one, which has `num_tokens` tokens, if there is one."""
        if (tokens := self.tokens + num_tokens) < self.config.train.tokens:
            self.feed.read(step_shape(self.config, tokens, self.step + 1))

    def advance(self, batch: Batch, num_tokens: int, flops: int, state: FastWeights) -> None:
        """Count a step with its tokens (without pads) and FLOPs, and keep the memory of the rows that go on.

        flops: this process's share, which is equal in all (`StepResult.flops`).
        """
        self._keep_lease()
        self.step += 1
        self.tokens += num_tokens
        if self.flops is not None:
            self.flops += flops * self.world.size
        self.samples += batch.tokens_BT.shape[0] * self.world.part.ranks
        self.carried = state if bool(batch.continues_B.any()) else None
        self.saver.poll()
        self.stopping.save_needs = max(self.saver.needs, self.status.save_seconds)
        self.status.progress(self.step, self.tokens, self.saver.longest)

    def _position(self) -> dict[str, Any]:
        return position(self.step, self.tokens, self.flops, self._date + time.monotonic())

    def log(self, record: dict[str, Any]) -> None:
        """Write one record to the metrics file, wandb and the progress line."""
        self._keep_lease()
        self.records.write(self._position() | record, self.step + self.rollbacks.undone)

    def _keep_lease(self) -> None:
        """Raise LeaseError if another process is known to have taken the run over."""
        if self.world.is_main:
            self.lease.check_known()

    def message(self, text: str) -> None:
        self.records.message(text)

    def save(self) -> None:
        """Start to write a checkpoint, unless there is one of this step. Its format does not depend on the layout."""
        self.progress.begin(Phase.SAVING)
        self.saver.make_way(self.step)
        if self.saver.newest != self.step:
            self._keep_lease()
            tensors = dict(self.engine.local_tensors(self.carried))
            documents = {STATE: json.dumps(self._state(), indent=1).encode(), CONFIG: self._resolved}
            if self.world.is_main:
                tensors[RNG] = torch.get_rng_state()
            # `_before_commit` syncs the records first: a run resumed from the checkpoint needs those of all its steps.
            self.saver.start(self.step, tensors, documents, self._before_commit)

    def _before_commit(self) -> None:
        """The main process calls it in the saving thread."""
        self.lease.check()
        self.records.sync()

    def finish_saving(self) -> None:
        """Wait for the last checkpoint.

        Raises LeaseError if it was not written and another process has taken the run over, else CheckpointError.
        """
        try:
            self.saver.finish()
        except CheckpointError:
            self._keep_lease()
            raise

    def _state(self) -> dict[str, Any]:
        """A checkpoint's content without tensors. Rates and the curriculum are functions of the tokens seen."""
        mesh = self.world.mesh
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples": self.samples,
            "skipped": self.skipped,
            "flops": self.flops,
            "spikes": self.spikes.state_dict(),
            "rollbacks": asdict(self.rollbacks),
            "data": self.feed.position(),
            TOKENIZER: self.source.tokenizer_hash,
            "wandb_id": self.records.wandb_id,
            "shape": None if self.shape is None else asdict(self.shape),
            "owes_evaluation": self.owes_evaluation,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "written_by": {
                "tensor": mesh.tensor.size,
                "pipeline": mesh.pipeline.size,
                "data": mesh.data.size,
                "zero": self.config.parallel.zero,
            },
        }

    def roll_back(self, why: str) -> None:
        """Go back from a failed step to the newest checkpoint that counts as good (`Rollbacks.good_until`).

        The data goes on after the failed step, with empty memory. Checkpoints and records after that checkpoint are
        removed, as if the run had read other data from there on. Raises HealthError if there is no such checkpoint.
        """
        self.progress.begin(Phase.ROLLBACK)
        self.saver.wait()
        self.feed.discard()
        bad_step = self.step + 1
        last_good = self.rollbacks.good_until(bad_step, self.config.health.spike_window)
        newest = newest_whole(self.saver.folder, self.world, last_good)
        if newest.whole is None:
            raise HealthError(
                f"{why}. There is no checkpoint of step {last_good} or before to go back to (health.spike_window); "
                "health.on_spike=skip and health.on_nonfinite=skip pass over such steps"
            )
        for path, damage in newest.damaged.items():
            self.message(f"{path.name} is damaged ({damage}); the one before is taken")
        checkpoint = newest.whole
        self._set_state(restore(checkpoint, self.engine, self.config.model, self.world))
        self.carried = None
        self.rollbacks.taken_back(bad_step, self.step)
        if self.world.is_main:
            self.lease.check()
            remove_after(self.saver.folder, self.step, self.pointer)
            self.records.truncate_after(self.step, self.rollbacks.total)
        self.log({"rollback": {"number": self.rollbacks.total, "bad_step": bad_step, "why": why}})
        self.message(f"rollback {self.rollbacks.total}: {why}; going on from step {self.step} with later data")

"""Writes checkpoints during the training: a thread in each process, one checkpoint at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from sleeptrain.checkpoint.folder import step_folder
from sleeptrain.checkpoint.keep import remove_superfluous
from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.snapshot import Snapshot
from sleeptrain.checkpoint.write import write
from sleeptrain.config.schema import CheckpointConfig
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError
from sleeptrain.remote import Location


class Saver:
    """Writes the checkpoints of a run into `folder`. All processes call its methods for the same steps.

    newest: the step of the newest checkpoint that is known to be whole.
    failures: the number of failed checkpoints in this process.
    longest: the most seconds that a checkpoint took.
    tell: shows a line to the user.
    reach: as in `superfluous`.
    pointer: as in `write`.
    A failure is reported and counted, and raises only in `finish`.
    """

    def __init__(
        self,
        folder: Location,
        world: World,
        settings: CheckpointConfig,
        tell: Callable[[str], None],
        reach: int = 0,
        pointer: Path | None = None,
    ):
        self.folder, self._world, self._settings, self._tell, self._reach = folder, world, settings, tell, reach
        self._pointer = pointer
        self.newest: int | None = None
        self.failures, self.longest = 0, 0.0
        self._last_error: CheckpointError | None = None
        self._save: _Save | None = None
        self._snapshot = Snapshot()

    @property
    def needs(self) -> float:
        """Seconds that one more checkpoint may take, with the wait for the checkpoint in progress."""
        return self.longest * (1 if self._save is None else 2)

    def make_way(self, step: int) -> None:
        """Waits for the checkpoint in progress, since the checkpoint of `step` is due."""
        if self._save is not None and self._save.is_alive():
            self._tell(f"step {step}: waiting for the checkpoint of step {self._save.step}, still being written")
        self.wait()

    def start(
        self,
        step: int,
        tensors: Tensors,
        documents: Mapping[str, bytes],
        before_commit: Callable[[], None],
    ) -> None:
        """Copies the tensors and starts `write` in the background. Call `make_way` first."""
        target, copies = step_folder(self.folder, step), self._snapshot.take(tensors)
        work = partial(write, target, copies, documents, self._world, before_commit, self._pointer)
        self._save = _Save(step, work, self._remove_superfluous)
        self._save.start()

    def poll(self) -> None:
        """Reports the result of the checkpoint in progress if it is done; does not wait."""
        if self._save is not None and not self._save.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint in progress, and reports a failure."""
        if self._save is None:
            return
        save, self._save = self._save, None
        save.join()
        self.longest = max(self.longest, save.seconds)
        self._last_error = save.error
        if save.not_removed is not None:
            self._tell(f"ALARM: an old checkpoint was not removed ({save.not_removed})")
        if save.error is None:
            self.newest = save.step
            return
        self.failures += 1
        on_disk = "none is on disk" if self.newest is None else f"the newest on disk is that of step {self.newest}"
        self._tell(f"ALARM: the checkpoint of step {save.step} was not written ({save.error}); {on_disk}")

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises CheckpointError if it was not written."""
        self.wait()
        if self._last_error is not None:
            raise CheckpointError(
                f"the last checkpoint was not written ({self._last_error}); free space or repair the storage, then the "
                f"same command goes on from {'the start' if self.newest is None else f'step {self.newest}'}"
            )

    def _remove_superfluous(self) -> None:
        if self._world.is_main:
            remove_superfluous(self.folder, self._settings.keep, self._settings.keep_every, self._reach)


class _Save(threading.Thread):
    """The thread that writes one checkpoint. It is a daemon: if another process dies, exit must not wait for it."""

    def __init__(self, step: int, work: Callable[[], None], clean: Callable[[], None]):
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step, self.seconds, self._began = step, 0.0, time.monotonic()
        self.error: CheckpointError | None = CheckpointError("the thread that writes it has ended early")
        self.not_removed: OSError | None = None
        self._work, self._clean = work, clean

    def run(self) -> None:
        try:
            self._work()
            self.error = None
            self._clean()
        except CheckpointError as error:
            self.error = error
        except OSError as error:
            self.not_removed = error
        finally:
            self.seconds = time.monotonic() - self._began
            del self._work  # releases the tensors

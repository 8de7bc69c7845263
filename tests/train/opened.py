"""Runs that are open, before their steps, as `sleeptrain.train.trainer` gets them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sleeptrain.config.compose import compose
from sleeptrain.config.resolved import run_folder
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.stop import StopRequest
from sleeptrain.train.open_run import open_run
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.watch.progress import Progress
from tests.checkpoint.worlds import alone
from tests.train.test_trainer import settings

SHAPE = StepShape(2, 6, 8)


@contextlib.contextmanager
def opened(folder: Path, *more: str, request: StopRequest | None = None) -> Iterator[Run | None]:
    """A run in this process, with the settings of `tests.train.test_trainer` and `more`."""
    config, world = compose(settings(folder, *more)), alone()
    status = Status(run_folder(config), writes=True)
    stopping = Stopping(None, request or StopRequest(says=False), world)
    with status.lease:
        run = open_run(config, world, Progress(), stopping, status)
        try:
            yield run
        finally:
            if run is not None:
                run.saver.wait()
                run.close()


@contextlib.contextmanager
def open_in(folder: Path, *more: str) -> Iterator[Run]:
    """The same, for a run that must open."""
    with opened(folder, *more) as run:
        assert run is not None
        yield run


def make_steps(run: Run, count: int) -> None:
    """Make steps that read their data and change no weights."""
    for _ in range(count):
        found = run.next_batch(SHAPE)
        assert found is not None
        run.shape = SHAPE
        run.advance(found.batch, found.totals.tokens, 100, run.model.empty_state())

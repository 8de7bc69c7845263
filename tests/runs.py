"""Access of a test to a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sleeptrain.train import trainer
from sleeptrain.train.run_state import Run


def on_open(patch: pytest.MonkeyPatch, look: Callable[[Run], Any]) -> None:
    """Calls `look` with each run that is trained from now on, when it is open, before its first step."""
    opened = trainer.open_run

    def open_run(*arguments: Any) -> Run | None:
        run = opened(*arguments)
        if run is not None:
            look(run)
        return run

    patch.setattr(trainer, "open_run", open_run)

"""A recorder without a GPU: what is recorded is the function, and to replay it is to run it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Recorder:
    """A `Capture`. recorded, replays: counts of functions and of their replays."""

    def __init__(self) -> None:
        self.recorded = self.replays = self.pools = 0

    def new_pool(self) -> Any:
        self.pools += 1
        return object()

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            function()

        return replay

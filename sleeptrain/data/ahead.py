"""Batches of later steps, prepared in the background, each by its own thread.

Threads and not processes: reading tokens costs less than sending them between processes, and a thread does not receive
the signals that ask the trainer to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Seconds between two checks whether the run has been asked to stop.
LOOK_EVERY = 0.2


class Cancelled(Exception):
    """Waiting for a step has ended without a result, because the run has been asked to stop."""


def never() -> bool:
    """The default of `stop`: the run is never asked to stop."""
    return False


class Ahead(Generic[T]):
    """Results of a function of a step, computed ahead of use.

    depth: number of later steps that are computed ahead; 0: none.
    stop: true if waiting for a result must end.
    """

    def __init__(self, depth: int, stop: Callable[[], bool] = never) -> None:
        self._depth, self._stop = depth, stop
        self._pending: dict[tuple[Any, ...], Future[T]] = {}

    def take(self, make: Callable[..., T], arguments: tuple[Any, ...], step: int) -> T:
        """Return `make(*arguments, step)`, and start the same call for the next steps.

        Results for other arguments are dropped. Raises the errors of `make`, and Cancelled.
        """
        if not self._depth:
            return make(*arguments, step)
        calls = [(*arguments, number) for number in range(step, step + 1 + self._depth)]
        self._pending = {call: self._pending.get(call) or in_thread(make, call, "data-ahead") for call in calls}
        return self._wait(self._pending.pop(calls[0]))

    def _wait(self, future: Future[T]) -> T:
        while not self._stop() or future.done():
            try:
                return future.result(LOOK_EVERY)
            except NotReady:
                if future.done():  # the step itself raised a TimeoutError
                    raise
        raise Cancelled


def in_thread(make: Callable[..., T], arguments: tuple[Any, ...], name: str) -> Future[T]:
    """Call `make` in a new thread; the future has its result, or raises its error where the result is asked for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make(*arguments))
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread, so that a process that ends does not wait for a step that is no longer needed.
    Thread(target=run, name=name, daemon=True).start()
    return future

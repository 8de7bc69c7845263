"""Steps made ahead of time, each by a thread of its own, while the trainer is busy with the one before.

Threads and not processes: reading tokens costs less than handing them from one process to another, and a thread
receives none of the signals that ask the trainer to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Seconds between two looks whether what is waited for is still wanted.
LOOK_EVERY = 0.2


class Cancelled(Exception):
    """A step was waited for in vain: the run has been asked to stop."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


class Ahead(Generic[T]):
    """Results of a function of a step, of which at most `depth` are made before they are asked for; 0: none.

    stop: whether to give up waiting for one that is being made.
    """

    def __init__(self, depth: int, stop: Callable[[], bool] = never) -> None:
        self._depth, self._stop = depth, stop
        self._waiting: dict[tuple[Any, ...], Future[T]] = {}

    def take(self, make: Callable[..., T], arguments: tuple[Any, ...], step: int) -> T:
        """`make(*arguments, step)`; those of the next steps are begun. Raises what it raises, and Cancelled.

        What had been made ahead for other arguments is given up.
        """
        if not self._depth:
            return make(*arguments, step)
        wanted = [(*arguments, number) for number in range(step, step + 1 + self._depth)]
        self._waiting = {key: self._waiting.get(key) or _begin(make, key) for key in wanted}
        return self._wait(self._waiting.pop(wanted[0]))

    def _wait(self, future: Future[T]) -> T:
        while not self._stop() or future.done():
            try:
                return future.result(LOOK_EVERY)
            except NotYet:
                if future.done():  # its own
                    raise
        raise Cancelled


def _begin(make: Callable[..., T], arguments: tuple[Any, ...]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make(*arguments))
        except BaseException as error:
            future.set_exception(error)

    # A daemon: a process that ends does not wait for a step that nobody wants any more.
    Thread(target=run, name="data-ahead", daemon=True).start()
    return future

"""Fetches numbered things in the background, before they are needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from sleeptrain.terminal import log_printable

logger = log_printable(__name__)

THREADS = 2


class Prefetcher:
    """Calls `fetch` with each requested number, in up to THREADS threads, which end when there is nothing to do.

    A failure is only logged; the code that needs the thing fetches it again and raises the error there.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._queue: deque[int] = deque()
        self._requested: set[int] = set()  # in the queue or in progress
        self._threads = 0

    def ask(self, number: int) -> None:
        """Request a number; returns at once. A number in the queue or in progress is not fetched twice."""
        with self._lock:
            if number in self._requested:
                return
            self._requested.add(number)
            self._queue.append(number)
            if self._threads == THREADS:
                return
            self._threads += 1
        threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                number = self._queue.popleft()
            try:
                self._fetch(number)
            except Exception as error:
                logger.warning("prefetch: %s", error)
            finally:
                with self._lock:
                    self._requested.discard(number)

"""Fetches ahead of need, in the background."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from sleeptrain.terminal import log_printable

logger = log_printable(__name__)

THREADS = 2


class Prefetcher:
    """Calls `fetch` with what it is asked for, in up to THREADS threads, which end when there is nothing to do.

    A failure is logged only: who needs the thing asks for it again and meets the error there.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._asked: set[int] = set()
        self._threads = 0

    def ask(self, number: int) -> None:
        """Returns at once. What is waiting or under way already is not fetched twice."""
        with self._lock:
            if number in self._asked:
                return
            self._asked.add(number)
            self._waiting.append(number)
            if self._threads == THREADS:
                return
            self._threads += 1
        threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                number = self._waiting.popleft()
            try:
                self._fetch(number)
            except Exception as error:
                logger.warning("prefetch: %s", error)
            finally:
                with self._lock:
                    self._asked.discard(number)

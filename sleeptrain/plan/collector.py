"""Python's cyclic garbage collector while schedules are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the collector: schedules are millions of small tuples without cycles, which it would visit again and again.

    That would take half of the time. Objects are still freed when nothing refers to them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

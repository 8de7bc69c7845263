"""The configuration of blocks and warps that a kernel runs with, where it has several.

flash-linear-attention measures them all at the first call with new sizes, which on a new GPU takes minutes of compiling
for the sizes of these tests. Inside `chosen` a kernel takes the first configuration of its list, or the last, that its
device can hold, and measures nothing. That also says which one was tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chosen(last: bool) -> Iterator[None]:
    """Let all kernels take their first or their last configuration inside."""
    from triton.runtime.autotuner import Autotuner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "run", run_one(Autotuner.run, last))
        yield


def run_one(run: Any, last: bool) -> Any:
    """`Autotuner.run` with one configuration, of which there is none to measure."""

    def run_chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        configurations = self.configs
        ordered = configurations[::-1] if last else configurations
        try:
            for configuration in ordered[:-1]:
                self.configs = [configuration]
                try:
                    return run(self, *args, **kwargs)
                except Exception as error:
                    if type(error).__name__ != "OutOfResources":  # of Triton, which a machine without GPUs has not
                        raise
            self.configs = ordered[-1:]
            return run(self, *args, **kwargs)
        finally:
            self.configs = configurations

    return run_chosen

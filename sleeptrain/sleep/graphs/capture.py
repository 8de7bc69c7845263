"""CUDA graphs: the kernels that a function launches, recorded once and launched again all together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """Records functions that read and write tensors whose place in memory stays, and return nothing."""

    def new_pool(self) -> Any:
        """Memory for what functions allocate inside. Those that share a pool run in the order of their recording."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function as it will be recorded, so that nothing is compiled, loaded or measured while recording."""

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Record the function without running it. Returns a function that runs what was recorded."""


class CudaCapture:
    """Records on a stream of its own: the default stream cannot be recorded."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read data and watch communication, may call what a recording forbids.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay

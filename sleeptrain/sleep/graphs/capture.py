"""CUDA graphs: the kernels that a function launches, recorded once and launched again all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """Records functions that read and write tensors whose place in memory stays, and return nothing."""

    def new_pool(self) -> Any:
        """Memory for what functions allocate inside. Those that share a pool run in the order of their recording."""

    def running(self) -> AbstractContextManager[None]:
        """Inside, functions may be recorded and replayed."""

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Record the function without running it. Returns a function that runs what was recorded.

        Run the function once before, so that nothing is compiled, loaded or measured while it is recorded.
        """


class CudaCapture:
    """Records on a stream of its own, for the default stream cannot be recorded.

    All that runs between two recordings runs on it too: autograd lets the stream on which a parameter was first used in
    a graph wait for its gradients, which a recording of another stream forbids.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def running(self) -> Iterator[None]:
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read data and watch communication, may call what a recording forbids.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay

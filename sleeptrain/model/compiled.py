"""`train.compile`: a block is one graph without a break under torch.compile, and blocks of one kind share the code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch

from sleeptrain.errors import ConfigError
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import Hybrid

BACKEND = "inductor"
# The most graphs of one kind of block, above any real number: with and without documents, pads, a state, a gradient.
MOST_GRAPHS = 64


def compile_blocks(model: Hybrid) -> None:
    """Let each block of `model` run as compiled code, which torch makes at the first call of each kind of block.

    Parameters keep their names, and a hook of a block runs around its compiled code. A block that cannot become one
    graph raises an error of torch at its call. A size that changes from call to call becomes a variable of the code.
    """
    compile_clock()
    code_of = cache(_compiled)
    for layer, block in zip(model.layers, model.blocks.values(), strict=True):
        block = cast(Block, block)
        kind = model.config.layers[layer] + ("" if block.has_mlp else "_alone")
        block.forward = CompiledForward(block, partial(code_of, kind))  # type: ignore[method-assign, assignment]


# Called with a block's forward and its arguments.
Wrapper = Callable[..., Any]


class CompiledForward:
    """The forward of a compiled block.

    code_of: the code of the block's kind, by the wrapper that it is compiled with.
    """

    def __init__(self, block: Block, code_of: Callable[[Wrapper | None], Callable[..., Any]]) -> None:
        self._block, self._code_of = block, code_of
        self._wrapper: Wrapper | None = None

    def __call__(self, *arguments: Any) -> Any:
        return self._code_of(self._wrapper)(self._block, *arguments)

    @contextmanager
    def compiled_in(self, wrapper: Wrapper) -> Iterator[None]:
        """Let the forward be the compiled code of `wrapper(forward, *arguments)` inside."""
        before, self._wrapper = self._wrapper, wrapper
        try:
            yield
        finally:
            self._wrapper = before


def _compiled(kind: str, wrapper: Wrapper | None) -> Callable[..., Any]:
    """Compiled code of a kind of block, whose first argument is the block."""
    function = Block.forward
    if wrapper is not None:

        def function(block: Block, *arguments: Any) -> Any:  # type: ignore[misc]
            return wrapper(partial(Block.forward, block), *arguments)

    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack a parameter
        _with_own_code(function, f"{kind}_block"), fullgraph=True, backend=BACKEND, recompile_limit=MOST_GRAPHS
    )
    return compiled


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under this name.

    Its code object is its own: torch keeps graphs, and which sizes change, for each code object.
    """
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


@contextmanager
def naming_compilation() -> Iterator[None]:
    """Turn an error of torch's compiler into a ConfigError that names `train.compile`."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"train.compile=true, but torch {torch.__version__} could not compile a block ({type(error).__name__}: "
            f"{first_line}); train.compile=false trains without compiled code"
        ) from error


class CompileClock:
    """The graphs that torch compiles in this process, and its time for them."""

    def __init__(self) -> None:
        self._seconds, self._started, self._graphs = 0.0, 0.0, self._all_graphs()

    def start(self, _: object) -> None:
        self._started = time.monotonic()

    def stop(self, _: object) -> None:
        self._seconds += time.monotonic() - self._started

    @staticmethod
    def _all_graphs() -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def take(self) -> str | None:
        """Text that names the graphs and seconds since the last call; None if nothing was compiled."""
        graphs, seconds = self._all_graphs(), self._seconds
        new, self._graphs, self._seconds = graphs - self._graphs, graphs, 0.0
        return f"train.compile: {new} graphs of blocks compiled in {seconds:.1f} s" if new else None


@cache
def compile_clock() -> CompileClock:
    """The clock of this process, which runs from the first call on."""
    from torch._dynamo import on_compile_end, on_compile_start

    clock = CompileClock()
    on_compile_start(clock.start)
    on_compile_end(clock.stop)
    return clock

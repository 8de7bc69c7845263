"""`train.precision`: the autocast that rounds run under, and the look at a first step's products that proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.loop import LoopSettings, ReadLogits, run_rounds
from sleeptrain.sleep.rounds import Round

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Products of two matrices: all those of linear layers and of the head, forward and backward, and no others. Recurrences
# and attention multiply stacks of matrices, in dtypes of their own (docs/numerics.md).
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def autocast(config: Config, device: torch.device, keep_casts: bool = True) -> torch.autocast:
    """keep_casts: weights are cast once for all products inside."""
    enabled = config.train.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def run_rounds_in_precision(
    config: Config,
    model: Hybrid,
    batch: Batch,
    rounds: Sequence[Round],
    state: FastWeights,
    settings: LoopSettings,
    read_logits: ReadLogits | None = None,
) -> tuple[dict[int, torch.Tensor], FastWeights]:
    """`run_rounds` in `train.precision`.

    An engine calls this from inside its forward. DeepSpeed's switches off an autocast that was entered outside of it.
    """
    with autocast(config, model.device):
        return run_rounds(model, batch, rounds, state, settings, read_logits)


class Products(TorchDispatchMode):
    """While it is entered: the dtypes in which this process multiplies matrices, backwards and recomputation included.

    It sees the operations that are executed, after autocast and whatever else has acted on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def proven_precision(config: Config, world: World, tell: Callable[[str], None]) -> Iterator[None]:
    """Every process enters it around the gradient of a first step, and is told what its products ran in.

    Raises ConfigError where they did not run in `train.precision`, in every process where they did not in one.
    """
    products = Products()
    with products:
        yield
    seen = set[str]().union(*world.all_or_raise(partial(_names, config, products.dtypes)))
    if seen:
        processes = "" if world.size == 1 else f" on all {world.size} processes"
        tell(f"the first step's matrix products ran in {' and '.join(sorted(seen))}{processes}")


def _names(config: Config, seen: set[torch.dtype]) -> set[str]:
    """The dtypes in words. Raises ConfigError for one that is not that of `train.precision`."""
    precision = config.train.precision
    names = {str(dtype).removeprefix("torch.") for dtype in seen}
    if seen - {DTYPES[precision]}:
        raise ConfigError(
            f"train.precision={precision}, but matrix products of the first step ran in {' and '.join(sorted(names))}: "
            f"the installed torch {torch.__version__} or DeepSpeed handles autocast in a way that sleeptrain does not "
            "know; install the versions it was tested with, or set train.precision to what ran"
        )
    return names

"""`train.precision`: the autocast of rounds, and a check of the dtypes that the first step multiplies in."""

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

# Products of two matrices. Linear layers and the head use them, forward and backward. Recurrences and attention use
# batched products, with other dtypes (docs/numerics.md).
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def autocast(config: Config, device: torch.device, keep_casts: bool = True) -> torch.autocast:
    """The autocast of `train.precision`. keep_casts: cast each weight once, for all products inside."""
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

    An engine calls this inside its forward: DeepSpeed's forward disables an autocast that was entered outside.
    """
    with autocast(config, model.device):
        return run_rounds(model, batch, rounds, state, settings, read_logits)


class Products(TorchDispatchMode):
    """While entered, records the dtypes of this process's matrix products, also in backward and recomputation.

    It sees the operations as they are executed, after autocast.
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
    """Checks the dtypes of the first step's matrix products. Every process enters it around that step's gradient.

    tell: called with a line that names the dtypes.
    Raises ConfigError in all processes if products of one process did not run in `train.precision`.
    """
    products = Products()
    with products:
        yield
    names = set[str]().union(*world.all_or_raise(partial(_dtype_names, config, products.dtypes)))
    if names:
        processes = "" if world.size == 1 else f" on all {world.size} processes"
        tell(f"the first step's matrix products ran in {' and '.join(sorted(names))}{processes}")


def _dtype_names(config: Config, seen: set[torch.dtype]) -> set[str]:
    """The names of the dtypes. Raises ConfigError for a dtype other than that of `train.precision`."""
    precision = config.train.precision
    names = {str(dtype).removeprefix("torch.") for dtype in seen}
    if seen - {DTYPES[precision]}:
        raise ConfigError(
            f"train.precision={precision}, but matrix products of the first step ran in {' and '.join(sorted(names))}: "
            f"the installed torch {torch.__version__} or DeepSpeed handles autocast in a way that sleeptrain does not "
            "know; install the versions it was tested with, or set train.precision to what ran"
        )
    return names

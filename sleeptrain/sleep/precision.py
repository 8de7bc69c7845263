"""`train.precision`: the dtypes of a step, and a check of the dtypes that the first step multiplies in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.config.schema import Config, TrainConfig
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in, read_narrow
from sleeptrain.model.working_copies import KeptCopies, working_copies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Products of two matrices. Linear layers and the head use them, forward and backward. Recurrences and attention use
# batched products, with other dtypes (docs/numerics.md).
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.sleeptrain.add_wide_products)


def product_bytes(train: TrainConfig) -> int:
    """Bytes of an element that products and attention read."""
    return DTYPES[train.precision].itemsize


def residual_bytes(train: TrainConfig) -> int:
    """Bytes of an element of the features between blocks."""
    return max(DTYPES[train.residual].itemsize, product_bytes(train))


def narrow_parameters(train: TrainConfig, model: nn.Module) -> set[str]:
    """The names of the parameters that may be stored in `train.precision`, since a step reads nothing wider of them."""
    return set() if train.precision == "fp32" else read_narrow(model)


@contextmanager
def in_precision(
    train: TrainConfig, model: Hybrid, copies: bool = True, kept: KeptCopies | None = None
) -> Iterator[None]:
    """Let `model` compute in `train.precision` inside, in forward, backward and recomputation, without autocast.

    The weights keep their dtype, and may not change inside. copies: each matrix is cast once, at entry
    (`working_copies`); False: at each use. kept: keeps these copies from step to step.
    """
    with torch.autocast(model.device.type, enabled=False):
        if train.precision == "fp32":
            yield
            return
        model.residual_dtype = DTYPES[train.residual]
        try:
            with computing_in(model, torch.bfloat16), working_copies(model, kept) if copies else nullcontext():
                yield
        finally:
            model.residual_dtype = None


class Products(TorchDispatchMode):
    """While entered, records the dtypes of this process's matrix products, also in backward and recomputation.

    It sees the operations as they are executed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: torch compiles inside this mode too, and the mode sees the operations that compiled code calls."""
        return True

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
            "a mixer multiplies by a weight that belongs to no linear layer, or the installed torch "
            f"{torch.__version__} behaves in a way that sleeptrain does not know; install the versions it was tested "
            "with, or set train.precision to what ran"
        )
    return names

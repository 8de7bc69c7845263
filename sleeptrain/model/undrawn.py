"""Models made where they train, without the values that torch draws for linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# The functions by which torch's modules draw.
DRAWS = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_})
_MARK = "_sleeptrain_undrawn"


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in DRAWS:
            return func(*args, **(kwargs or {}))
        tensor = args[0] if args else (kwargs or {})["tensor"]
        setattr(tensor, _MARK, True)
        return tensor


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Modules made inside are on the device at once, and what torch would draw has any values: `init_weights` draws it.

    So a model never lies whole on the CPU, and nothing is drawn twice.
    """
    with device, _Undrawn():
        yield


def lacks_values(parameter: torch.Tensor) -> bool:
    """True for a parameter made under `undrawn` whose module would have drawn its values."""
    return bool(getattr(parameter, _MARK, False))

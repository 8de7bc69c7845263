"""What operators take from flash-linear-attention, at the first call: without a GPU the package may be missing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from sleeptrain.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

# Where the package tilelang is installed, flash-linear-attention replaces a kernel of its own by tilelang's without a
# word. This variable decides. The replacement has not passed tests/kernels, so it is off unless the variable is set.
# The package flash_qla replaces a whole recurrence with its autograd: operators call the parts, which it leaves alone.
REPLACEMENTS = ("FLA_TILELANG",)
MODULES = ("fla.ops.gated_delta_rule", "fla.ops.simple_gla", "fla.modules.causal_conv1d", "fla.modules.norm")


def from_fla(module: str, name: str) -> Any:
    """A function or constant of flash-linear-attention. Raises ConfigError if the package cannot be imported."""
    for switch in REPLACEMENTS:
        os.environ.setdefault(switch, "0")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as missing:
        raise ConfigError(
            f"CUDA tensors need the Triton kernels of flash-linear-attention ({missing}): "
            "pip install 'sleeptrain[gpu]', or ask for implementation='chunked'"
        ) from missing


def load_kernels() -> None:
    """Raises ConfigError if flash-linear-attention cannot be imported."""
    for module in MODULES:
        from_fla(module, "__name__")


def on_its_device(implementation: Callable[P, R]) -> Callable[P, R]:
    """Run an implementation on the GPU of its first argument: Triton launches kernels on the current GPU."""

    @wraps(implementation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.cuda.device_of(first):
            return implementation(*args, **kwargs)

    return run

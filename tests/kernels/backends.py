"""The implementations of the kernels that are compared with an oracle: where they run, and how exact they must be."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels import interpreter


@dataclass(frozen=True)
class Replacement:
    """An implementation that flash-linear-attention takes by itself in place of its own, where a package is installed.

    switch: the variable of the environment that turns it on or off. place, function: what is called then.
    """

    package: str
    switch: str
    place: tuple[str, str]
    function: str


REPLACEMENTS = {
    "tilelang": Replacement(
        "tilelang", "FLA_TILELANG", ("fla.ops.common.backends.tilelang", "CommonTileLangBackend"), "chunk_bwd_dqkwg"
    ),
    # Of the package's public function alone, which models do not call.
    "flash_qla": Replacement(
        "flash_qla",
        "FLA_FLASH_QLA",
        ("fla.ops.gated_delta_rule.backends.flash_qla", "FlashQLABackend"),
        "chunk_gated_delta_rule",
    ),
}


@dataclass(frozen=True)
class Backend:
    """name: `fla`, or a key of REPLACEMENTS. tolerance: the largest error of a value or gradient, relative to the
    largest element of its tensor."""

    name: str
    device: str
    dtype: torch.dtype
    tolerance: float

    @property
    def label(self) -> str:
        return f"{self.name}-{self.device}-{str(self.dtype).removeprefix('torch.')}"

    def why_not(self) -> str | None:
        """What this process lacks, None if it can run the kernels."""
        if self.device == "cpu":
            return None if interpreter.ACTIVE else "needs TRITON_INTERPRET=1: make test-kernels"
        if interpreter.ACTIVE or not torch.cuda.is_available():
            return "needs a CUDA device, without TRITON_INTERPRET"
        needed = [REPLACEMENTS[self.name].package] if self.name in REPLACEMENTS else []
        missing = [package for package in ("fla", *needed) if importlib.util.find_spec(package) is None]
        return f"needs the package {missing[0]}" if missing else None


# On a CPU fp32 is exact to rounding. On CUDA Triton multiplies fp32 as TF32, with 10 bits; bf16 has 7.
OWN = [
    Backend("fla", "cpu", torch.float32, 1e-5),
    Backend("fla", "cpu", torch.float16, 5e-3),
    Backend("fla", "cuda", torch.float32, 1e-2),
    Backend("fla", "cuda", torch.bfloat16, 4e-2),
]
RECURRENCES = [*OWN, Backend("tilelang", "cuda", torch.bfloat16, 4e-2)]
PUBLIC = [*OWN, Backend("flash_qla", "cuda", torch.bfloat16, 4e-2)]


def parameters(backends: list[Backend]) -> list[Any]:
    """Parameters of tests, with the marks by which `make test-kernels` and `pytest -m gpu` choose."""
    return [
        pytest.param(b, id=b.label, marks=pytest.mark.kernels if b.device == "cpu" else pytest.mark.gpu)
        for b in backends
    ]


@contextmanager
def only(name: str, calls: list[str]) -> Iterator[None]:
    """Turn off all replacements but the one of this name, whose calls are noted in `calls`."""
    with pytest.MonkeyPatch.context() as patch:
        for other, replacement in REPLACEMENTS.items():
            patch.setenv(replacement.switch, "1" if other == name else "0")
        if name in REPLACEMENTS:
            patch_counted(patch, REPLACEMENTS[name], calls)
        yield


def patch_counted(patch: pytest.MonkeyPatch, replacement: Replacement, calls: list[str]) -> None:
    module, name = replacement.place
    place = getattr(importlib.import_module(module), name)
    patch.setattr(place, replacement.function, counted(getattr(place, replacement.function), calls))


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return run

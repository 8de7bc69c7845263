"""Where tests of whole steps run: on the CPU always, by GPU kernels in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from sleeptrain.ops.device import as_on_gpu
from tests.kernels import interpreter
from tests.kernels.tuning import chosen

if interpreter.ACTIVE:
    interpreter.install()

PLACES = [
    pytest.param("cpu"),
    pytest.param("interpreted", marks=pytest.mark.kernels),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# For what other tests hold the CPU to, and takes the interpreter many minutes.
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), PLACES[2]]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device. Kernels with several configurations take the last one, as in `tests/kernels`."""
    where = request.param
    if where == "cpu":
        yield torch.device("cpu")
        return
    if where == "cuda" and (interpreter.ACTIVE or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, without TRITON_INTERPRET")
    if where == "interpreted" and not interpreter.ACTIVE:
        pytest.skip("needs TRITON_INTERPRET=1: make test-kernels")
    tuned = where == "cuda" and request.config.getoption("--tuned")
    kernels = as_on_gpu() if where == "interpreted" else nullcontext()
    with nullcontext() if tuned else chosen(last=True), kernels, np.errstate(over="ignore"):
        yield torch.device("cuda" if where == "cuda" else "cpu")

"""The loss of some rows of logits at a time, by fla's cross entropy, against whole logits in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops.linear_cross_entropy import linear_cross_entropy
from tests.kernels.backends import OWN, Backend, parameters
from tests.kernels.comparison import drawn, error, leaves_on

ROWS = 9
# A CPU has no product of narrow matrices that gives fp32.
BACKENDS = [backend for backend in OWN if backend.dtype != torch.float16]


@pytest.mark.parametrize("backend", parameters(BACKENDS), indirect=True)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_the_loss(backend: Backend, within: Callable[..., None], vocab_size: int, keep: bool) -> None:
    """A row of more than 65,536 logits is read in parts."""
    targets = torch.randint(vocab_size, (ROWS,), generator=torch.Generator().manual_seed(2)).to(backend.device)

    def run(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        copy = weight.detach().to(x.dtype)
        return [linear_cross_entropy(x, weight, targets, copy_VD=copy, rows=4, keep=keep)]

    def oracle(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return [F.cross_entropy(x @ weight.t(), targets.to(x.device), reduction="none")]

    within("loss", error(run, oracle, leaves_on(backend, drawn((ROWS, 16), (vocab_size, 16)), narrow=1)), factor=4)

"""A kernel beside its oracle: the same inputs, the same random gradients of the outputs, all results compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests.kernels.backends import Backend
from tests.ops.cases import leaves

Run = Callable[..., Sequence[torch.Tensor]]


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Normal random tensors in fp64, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def leaves_on(backend: Backend, tensors: Sequence[torch.Tensor], narrow: int) -> list[torch.Tensor]:
    """Leaves on the backend's device: the first `narrow` in its dtype, the others in fp32, as models hold them."""
    dtypes = [backend.dtype] * narrow + [torch.float32] * (len(tensors) - narrow)
    return [x.detach().to(backend.device, d).requires_grad_() for x, d in zip(tensors, dtypes, strict=True)]


def error(run: Run, oracle: Run, tensors: Sequence[torch.Tensor], through: Sequence[int] | None = None) -> float:
    """The largest error of outputs and gradients, each tensor's relative to its own largest element.

    The oracle gets the same tensors in fp64. through: the outputs that have a gradient; None: all.
    """
    before = [x.detach().clone() for x in tensors]
    found, exact = run(*tensors), leaves(tensors, torch.float64)
    expected = oracle(*exact)
    chosen = range(len(found)) if through is None else through
    gradients = [x.to(found[i]) for i, x in zip(chosen, drawn(*(found[i].shape for i in chosen), seed=1), strict=True)]
    pairs = [
        torch.autograd.grad(
            [outputs[i] for i in chosen],
            inputs,
            [x.to(outputs[i]) for i, x in zip(chosen, gradients, strict=True)],
            allow_unused=through is not None,
            materialize_grads=through is not None,
        )
        for outputs, inputs in ((found, tensors), (expected, exact))
    ]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "an input was changed in place"
    compared = zip([*found, *pairs[0]], [*expected, *pairs[1]], strict=True)
    return torch.stack([_relative(a, b) for a, b in compared]).max().item()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """NaN if one holds a NaN. What is exactly zero, such as a gradient of the first decay without a state, has no size
    of its own: there the inputs' size counts, which is 1."""
    size = expected.double().abs().max()
    return ((found.double() - expected.double()).abs().max() / torch.where(size > 0, size, 1.0)).cpu()

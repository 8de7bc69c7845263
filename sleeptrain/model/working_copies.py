"""What a step keeps of weights while none changes: narrow matrices, scales of norms, decays, gradients to add to.

A step uses each weight in every round. What depends on the weight alone is computed once, and the gradients of the uses
are added up with few kernels: those of matrices where they are computed, those of vectors all together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import nn

from sleeptrain.model.decay import KeepsDecayWide
from sleeptrain.model.linear import MatrixReader, Product
from sleeptrain.model.norm import RMSNorm
from sleeptrain.ops.row_stacks import RowStacks, adds_wide, stacking_rows

MOST_ELEMENTS = 2**17  # of a vector; the gradients of all its uses are held until the step's last backward has ended


class KeptCopies:
    """Keeps copies of matrices, scales and decays in their place from step to step, for CUDA graphs read them.

    stacks: the memory of rows that products of few rows keep, to which graphs copy them.
    """

    def __init__(self) -> None:
        self.stacks = RowStacks()
        self._tensors: dict[int, torch.Tensor] = {}

    def empty_like(self, module: object, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor of this module, whose values are those of the step before. weight: of the module."""
        if id(module) not in self._tensors:
            self._tensors[id(module)] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        return self._tensors[id(module)]


@contextmanager
def working_copies(model: nn.Module, kept: KeptCopies | None = None) -> Iterator[None]:
    """Keep a copy of each matrix in the compute dtype, with the values at entry, and let uses add to its gradient.

    A matrix that has the compute dtype is its own copy. Its gradient is wider than the matrix, which torch.compile
    refuses, so it is out of sight inside. Enter it around the forwards and backwards of a step, between which no weight
    changes, and not under ZeRO-3: copies would hold the whole model, of which a process holds a part. Where gradients
    are computed, a matrix without one gets a gradient of zeros; gradients of vectors and other small tensors are None
    inside and complete at exit. kept: keeps the copies from step to step; None: they live inside.
    """
    modules = [m for m in model.modules() if isinstance(m, MatrixReader) and m.compute_dtype is not None]
    readers: list[tuple[MatrixReader, torch.Tensor]]
    readers = [(module, matrix) for module in modules if (matrix := module.matrix) is not None]
    if not readers:
        yield
        return
    gradients = {matrix: _gradient(matrix) for _, matrix in readers}
    hidden = {m: m.grad for m, added_to in gradients.items() if _is_wide(m.grad, m) and _is_unread(added_to)}
    for module, matrix in readers:
        module.gradient = _used(module, gradients[matrix])
    for matrix in hidden:
        matrix.grad = None
    products = [(module, _used(module, matrix.detach())) for module, matrix in readers if isinstance(module, Product)]
    norms = [module for module in model.modules() if isinstance(module, RMSNorm) and module.zero_centred]
    mixers = [module for module in model.modules() if isinstance(module, KeepsDecayWide)]
    _copy_matrices(products, kept)
    _compute_scales(norms, kept)
    _compute_rates(mixers, kept)
    totals = [p.gradient for p, _ in products if p.gradient is not None and _adds_wide(p, p.gradient)]
    sums = LateSums([p for p in model.parameters() if p not in gradients and _is_summed_late(p)])
    try:
        with stacking_rows(totals, None if kept is None else kept.stacks):
            yield
    finally:
        sums.close()
        for module, _ in readers:
            module.gradient = None
        for product, _ in products:
            product.working_copy = None
        for norm in norms:
            norm.scale = None
        for mixer in mixers:
            mixer.rate = None
        for matrix, gradient in hidden.items():
            matrix.grad = gradient


T = TypeVar("T", torch.Tensor, torch.Tensor | None)


def _used(module: MatrixReader, matrix: T) -> T:
    """The rows of a matrix, or of its gradient, that the module uses."""
    rows = module.used_rows if isinstance(module, Product) else None
    return matrix if rows is None or matrix is None else matrix[rows]


def _copy_matrices(products: Sequence[tuple[Product, torch.Tensor]], kept: KeptCopies | None) -> None:
    """Set the working copy of each module from the rows of its matrix."""
    wide = [(module, matrix) for module, matrix in products if matrix.dtype != module.compute_dtype]
    copies = [_empty_like(kept, module, matrix, module.compute_dtype) for module, matrix in wide]
    if copies:
        torch._foreach_copy_(copies, [matrix for _, matrix in wide])
    for module, matrix in products:
        module.working_copy = matrix
    for (module, _), copy in zip(wide, copies, strict=True):
        module.working_copy = copy


@torch.no_grad()
def _compute_scales(norms: Sequence[RMSNorm], kept: KeptCopies | None) -> None:
    """Set the scale of each norm: 1 + its weight."""
    scales = [_empty_like(kept, norm, norm.weight, None) for norm in norms]
    if scales:
        torch._foreach_copy_(scales, [norm.weight for norm in norms])
        torch._foreach_add_(scales, 1.0)
    for norm, scale in zip(norms, scales, strict=True):
        norm.scale = scale


@torch.no_grad()
def _compute_rates(mixers: Sequence[KeepsDecayWide], kept: KeptCopies | None) -> None:
    """Set the rate of each mixer: -exp(A_log)."""
    rates = [_empty_like(kept, mixer, mixer.A_log, None) for mixer in mixers]
    if rates:
        torch._foreach_copy_(rates, [mixer.A_log for mixer in mixers])
        torch._foreach_exp_(rates)
        torch._foreach_neg_(rates)
    for mixer, rate in zip(mixers, rates, strict=True):
        mixer.rate = rate


def _empty_like(
    kept: KeptCopies | None, module: object, weight: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    if kept is None:
        return torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return kept.empty_like(module, weight, dtype)


def _adds_wide(product: Product, total: torch.Tensor) -> bool:
    return product.working_copy is not None and adds_wide(product.working_copy, total.dtype)


def _is_wide(gradient: torch.Tensor | None, matrix: torch.Tensor) -> bool:
    return gradient is not None and gradient.dtype != matrix.dtype


def _is_unread(added_to: torch.Tensor | None) -> bool:
    """True if autograd does not read the gradient of a matrix. added_to: `_gradient`."""
    return added_to is not None or not torch.is_grad_enabled()


def _gradient(matrix: torch.Tensor) -> torch.Tensor | None:
    """The tensor to which uses may add. None for a matrix with a hook, which reads what autograd adds."""
    if is_hooked(matrix) or not (matrix.requires_grad and torch.is_grad_enabled()):
        return None
    if matrix.grad is None:
        matrix.grad = torch.zeros_like(matrix)
    return matrix.grad


def _is_summed_late(parameter: torch.Tensor) -> bool:
    is_trained = parameter.requires_grad and torch.is_grad_enabled()
    return is_trained and parameter.numel() <= MOST_ELEMENTS and not is_hooked(parameter)


def is_hooked(parameter: torch.Tensor) -> bool:
    """True if a hook reads the parameter's gradient in the backward."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


class LateSums:
    """Takes the gradient of each use of some parameters from autograd, and adds them up at the end, use by use.

    Autograd launches a kernel for each sum; here one launch adds to many parameters. The order of a parameter's sum is
    that of autograd.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._uses = {p: [] if p.grad is None else [p.grad] for p in parameters}
        for p in parameters:
            p.grad = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in parameters]

    def _take(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._uses[parameter].append(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def close(self) -> None:
        """Add up. A parameter that has had a gradient keeps its tensor, and one without a use has none."""
        for hook in self._hooks:
            hook.remove()
        used = {p: uses for p, uses in self._uses.items() if uses}
        for p, uses in used.items():
            p.grad = uses[0]
        for nth in zip_longest(*(uses[1:] for uses in used.values())):
            pairs = [(first, use) for (first, *_), use in zip(used.values(), nth, strict=True) if use is not None]
            torch._foreach_add_([first for first, _ in pairs], [use for _, use in pairs])

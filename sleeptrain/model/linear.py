"""Linear layers that compute in bf16 while their weights stay fp32.

A matrix that is used in several rounds of a step is cast once: its bf16 copy lives as long as the step's forward and
backward (`working_copies`). The product that computes the gradient of a use adds it to the fp32 gradient of the weight,
as in Megatron-LM's fused accumulation. Under autocast, whose cached cast is one node of the graph, autograd would add
the uses in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.ops.add_product import add_product


class ComputeDtype:
    """A module with a dtype for its matrix products. compute_dtype: None: that of inputs and weights."""

    compute_dtype: torch.dtype | None = None

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """x in the compute dtype."""
        return x if self.compute_dtype is None else x.to(self.compute_dtype)


class Product(ComputeDtype):
    """A module that multiplies by a matrix.

    working_copy: the matrix in the compute dtype; None: each use casts it.
    gradient: the gradient of the matrix, to which the backward of each use adds; None: autograd adds the uses.
    """

    working_copy: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    weight: torch.Tensor

    @property
    def matrix(self) -> torch.Tensor | None:
        """The matrix of which `working_copies` keeps a copy; None if another module has it."""
        return self.weight

    @property
    def used_rows(self) -> slice | None:
        """The rows of `matrix` that it multiplies by; None: all."""
        return None

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., D], weight [C, D], bias [C] -> x @ weight^T + bias, [..., C] in the compute dtype."""
        if self.compute_dtype is None:
            return F.linear(x, weight, bias)
        # Each product casts x for itself: the gradients of several products add up in the dtype of x.
        return _Product.apply(self.narrow(x), weight, bias, self.copy_of(weight), self.gradient)

    def copy_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in the compute dtype, without its graph."""
        return weight.detach().to(self.compute_dtype) if self.working_copy is None else self.working_copy


class Linear(Product, nn.Linear):
    """`nn.Linear` with a compute dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.product(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x @ copy^T + bias, whose gradients of weight and bias are in the dtypes of weight and bias.

    The gradient of the weight is added to `gradient` where there is one. It is no saved tensor: uses that come later in
    the backward find it changed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        copy: torch.Tensor,
        gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, copy)
        ctx.gradient = gradient
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        flat = x.flatten(0, -2)
        y = flat @ copy.t() if bias is None else torch.addmm(bias.to(copy.dtype), flat, copy.t())
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = dy.flatten(0, -2)
        dx = (flat @ copy).view_as(x) if needs_x else None
        dweight = add_product(ctx.gradient, flat.t(), x.flatten(0, -2), ctx.weight_dtype) if needs_weight else None
        dbias = flat.sum(0, dtype=ctx.bias_dtype) if needs_bias and ctx.bias_dtype is not None else None
        return dx, dweight if ctx.gradient is None else None, dbias, None, None


def adopt_linears(module: nn.Module) -> None:
    """Turn each plain `nn.Linear` inside into a `Linear` with the same parameters, hooks and name."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the matrix products of `model` compute in `dtype` inside, in forward, backward and recomputation."""
    modules = [module for module in model.modules() if isinstance(module, ComputeDtype)]
    for module in modules:
        module.compute_dtype = dtype
    try:
        yield
    finally:
        for module in modules:
            module.compute_dtype = None


@contextmanager
def working_copies(model: nn.Module) -> Iterator[None]:
    """Keep a copy of each matrix in the compute dtype, with the values at entry, and let uses add to its gradient.

    Enter it around the forwards and backwards of a step, between which no weight changes, and not under ZeRO-3: copies
    would hold the whole model, of which a process holds a part. Where gradients are computed, a matrix without one gets
    a gradient of zeros.
    """
    modules = [module for module in model.modules() if isinstance(module, Product) and module.compute_dtype is not None]
    pairs = [(module, matrix) for module in modules if (matrix := module.matrix) is not None]
    with torch.no_grad():
        used = [_used(module, matrix) for module, matrix in pairs]
        copies = [torch.empty_like(t, dtype=module.compute_dtype) for (module, _), t in zip(pairs, used, strict=True)]
        if pairs:
            torch._foreach_copy_(copies, used)
    for (module, matrix), copy in zip(pairs, copies, strict=True):
        gradient = _gradient(matrix)
        module.working_copy, module.gradient = copy, None if gradient is None else _used(module, gradient)
    try:
        yield
    finally:
        for module, _ in pairs:
            module.working_copy = module.gradient = None


def _used(module: Product, matrix: torch.Tensor) -> torch.Tensor:
    return matrix if module.used_rows is None else matrix[module.used_rows]


def _gradient(matrix: torch.Tensor) -> torch.Tensor | None:
    """The tensor to which uses may add. None for a matrix with a hook, which reads what autograd adds."""
    hooked = matrix._backward_hooks or getattr(matrix, "_post_accumulate_grad_hooks", None)
    if hooked or not (matrix.requires_grad and torch.is_grad_enabled()):
        return None
    if matrix.grad is None:
        matrix.grad = torch.zeros_like(matrix)
    return matrix.grad

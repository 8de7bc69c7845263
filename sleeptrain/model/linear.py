"""Linear layers that compute in bf16 while gradients, and the weights that are updated, are fp32.

A matrix that is used in several rounds of a step is cast once: its bf16 copy lives as long as the step's forward and
backward (`working_copies`). Where fp32 masters are elsewhere (`sleeptrain.parallel.zero.working_weights`), the
parameter itself is bf16 and serves as the copy. The product that computes the gradient of a use adds it to the fp32
gradient of the weight, as in Megatron-LM's fused accumulation; a look-up of embeddings adds the rows that it read.
Under autocast, whose cached cast is one node of the graph, autograd would add the uses in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.ops.add_product import add_product, add_products, gradient_dtype


class ComputeDtype:
    """A module with a dtype for its matrix products. compute_dtype: None: that of inputs and weights."""

    compute_dtype: torch.dtype | None = None

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """x in the compute dtype."""
        return x if self.compute_dtype is None else x.to(self.compute_dtype)


class MatrixReader(ComputeDtype):
    """A module that reads a matrix in no other dtype than the compute dtype.

    gradient: the gradient of the matrix, to which the backward of each use adds; None: autograd adds the uses.
    """

    gradient: torch.Tensor | None = None
    weight: torch.Tensor

    @property
    def matrix(self) -> torch.Tensor | None:
        """The matrix; None if another module has it."""
        return self.weight


class Product(MatrixReader):
    """A module that multiplies by a matrix.

    working_copy: the rows of the matrix that it multiplies by, in the compute dtype; None: each use casts them.
    """

    working_copy: torch.Tensor | None = None

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


def products_of(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """layer(x) for each layer. The backward adds the gradients of x up in the products that compute them.

    Layers that are no plain `Linear` in the dtype of x, or have a bias or a hook, are called one by one.
    """
    if not all(type(layer) is Linear and _multiplies_plainly(layer, x.dtype) for layer in layers):
        return [layer(x) for layer in layers]
    linears = [cast(Linear, layer) for layer in layers]
    arguments = [(layer.weight, layer.copy_of(layer.weight), layer.gradient) for layer in linears]
    return list(_SharedProducts.apply(x, *chain.from_iterable(arguments)))


def _multiplies_plainly(layer: Linear, dtype: torch.dtype) -> bool:
    return layer.compute_dtype == dtype and layer.bias is None and not is_called_with_hooks(layer)


def is_called_with_hooks(layer: nn.Module) -> bool:
    """True if a call of the layer runs more than its forward."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(map(bool, hooks))


class _SharedProducts(torch.autograd.Function):
    """x @ copy^T of several matrices, given as (weight, copy, gradient) one after another, as in `_Product`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *matrices: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        copies, ctx.gradients = matrices[1::3], matrices[2::3]
        ctx.dtypes = [gradient_dtype(weight) for weight in matrices[::3] if weight is not None]
        ctx.save_for_backward(x, *copies)
        ctx.set_materialize_grads(False)
        flat = x.flatten(0, -2)
        return tuple((flat @ copy.t()).unflatten(0, x.shape[:-1]) for copy in copies if copy is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *copies = ctx.saved_tensors
        needs_x, *needs_matrices = ctx.needs_input_grad
        dweights: list[torch.Tensor | None] = [None] * len(needs_matrices)
        dx, rows = None, x.flatten(0, -2)
        totals: list[torch.Tensor] = []  # torch.compile does not trace a call of `list[torch.Tensor]`
        factors: list[torch.Tensor] = []
        for index, (dy, copy, gradient) in enumerate(zip(dys, copies, ctx.gradients, strict=True)):
            if dy is None:
                continue
            flat = dy.flatten(0, -2)
            if needs_x:
                dx = add_product(dx, flat, copy, x.dtype)
            if needs_matrices[3 * index] and gradient is None:
                dweights[3 * index] = add_product(None, flat.t(), rows, ctx.dtypes[index])
            elif needs_matrices[3 * index]:
                totals.append(gradient)
                factors.append(flat.t())
        add_products(totals, factors, rows)
        return None if dx is None else dx.view_as(x), *dweights


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
        ctx.weight_dtype, ctx.bias_dtype = gradient_dtype(weight), None if bias is None else bias.dtype
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


def read_narrow(model: nn.Module) -> set[str]:
    """The names of the matrices that are read in the compute dtype only."""
    read = [module.matrix for module in model.modules() if isinstance(module, MatrixReader)]
    return {name for name, p in model.named_parameters() if any(p is matrix for matrix in read)}


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

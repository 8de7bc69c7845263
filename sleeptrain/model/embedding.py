"""Rows of an embedding matrix, read in the compute dtype, with a gradient that is never narrower than fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.model.linear import ComputeDtype
from sleeptrain.ops.add_product import gradient_dtype


class LookUp(ComputeDtype):
    """A module that reads rows of a matrix, rounded to the compute dtype."""

    weight: torch.Tensor

    @property
    def narrow_parameter(self) -> torch.Tensor:
        return self.weight


class Embedding(LookUp, nn.Embedding):
    """`nn.Embedding` with a compute dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return look_up(input, self.weight, self.compute_dtype)


def look_up(tokens: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The rows [..., D] of the tokens (int64), rounded to `dtype` and then fp32 or wider; None: as they are.

    So the features are the same whether the matrix is stored in `dtype` or in fp32.
    """
    if dtype is None:
        return F.embedding(tokens, weight_VD)
    rows: torch.Tensor = _LookUp.apply(tokens, weight_VD, dtype)
    return rows


class _LookUp(torch.autograd.Function):
    """The gradients of the rows of one token are added in fp32; autograd would add them in the matrix's dtype."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows = len(weight)
        return F.embedding(tokens, weight).to(dtype).to(gradient_dtype(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        dweight = torch.ops.aten.embedding_dense_backward(dy, tokens, ctx.num_rows, -1, False)
        return None, dweight, None

"""SwiGLU feed-forward (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.model.linear import products_of
from sleeptrain.ops import fla_elementwise
from sleeptrain.ops.device import runs_kernels


class SwiGLU(nn.Module):
    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(*products_of(x_BTD, (self.gate_proj, self.up_proj))))


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, [..., D]; a GPU's kernel computes in fp32."""
    if runs_kernels(gate):
        return fla_elementwise.swiglu(gate, value)
    return F.silu(gate) * value

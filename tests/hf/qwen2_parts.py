"""What Jet-Nemotron and Ouro have of the Llama kind, with the names of their published code, written plainly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class MLP(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """reach: how many tokens one sees, itself included."""

    def __init__(self, c: dict[str, Any], bias: bool, reach: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.width = c.get("head_dim", c["hidden_size"] // self.heads)
        self.theta, self.reach = c["rope_theta"], reach
        self.q_proj = nn.Linear(c["hidden_size"], self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(c["hidden_size"], self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(c["hidden_size"], self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_tokens = x.shape[1]
        q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotated(q), self.rotated(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.width**0.5
        back = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        seen = (back >= 0) & (back < (self.reach or num_tokens))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        rates = self.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), rates)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

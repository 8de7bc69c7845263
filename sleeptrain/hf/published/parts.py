"""The Llama-like layers of Jet-Nemotron and Ouro, with the names of their published code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# The fast weights S [B, H, K, V] of each layer; None before the first token, and for layers without S.
Memory = list[torch.Tensor | None]


class Published(nn.Module):
    """A published model. settings: its `config.json`."""

    def __init__(self, settings: Mapping[str, Any], layers: list[nn.Module]):
        super().__init__()
        self.model = Trunk(settings, layers)
        self.lm_head: nn.Linear | None = None
        if not settings["tie_word_embeddings"]:
            self.lm_head = nn.Linear(settings["hidden_size"], settings["vocab_size"], bias=False)

    def empty_memory(self) -> Memory:
        return [None] * len(self.model.layers)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens_BT)

    @abstractmethod
    def loop(self, x_BTD: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """One pass: (features [B, T, D], memory) after all layers."""

    @abstractmethod
    def predict(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, V] of features of `loop`."""

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BTD, (self.lm_head or self.model.embed_tokens).weight)


class Trunk(nn.Module):
    """The model without its head."""

    def __init__(self, settings: Mapping[str, Any], layers: list[nn.Module]):
        super().__init__()
        self.embed_tokens = nn.Embedding(settings["vocab_size"], settings["hidden_size"])
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(settings["hidden_size"], settings["rms_norm_eps"])


class Norm(nn.Module):
    """RMSNorm that multiplies by the plain weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        dim, hidden = settings["hidden_size"], settings["intermediate_size"]
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Causal attention with rotary positions. reach: tokens that a token attends to, itself included; None: all."""

    def __init__(self, settings: Mapping[str, Any], bias: bool, reach: int | None = None):
        super().__init__()
        dim = settings["hidden_size"]
        self.heads, self.kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
        self.width = settings.get("head_dim") or dim // self.heads
        self.theta, self.reach = settings["rope_theta"], reach
        self.q_proj = nn.Linear(dim, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, dim, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        num_tokens = x_BTD.shape[1]
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotated(q), self.rotated(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (k, v))
        scores_BHTT = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.width**0.5
        back = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        seen = (back >= 0) & (back < (self.reach or num_tokens))
        weights_BHTT = scores_BHTT.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights_BHTT, v).flatten(2))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        rates = self.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), rates)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

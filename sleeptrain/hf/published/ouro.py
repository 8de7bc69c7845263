"""Ouro as its published code defines it (modeling_ouro.py beside huggingface ByteDance/Ouro-1.4B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sleeptrain.hf.published.parts import MLP, Attention, Memory, Norm, Published


class Layer(nn.Module):
    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        dim, eps = settings["hidden_size"], settings["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(settings, bias=False), MLP(settings)
        self.input_layernorm, self.input_layernorm_2 = Norm(dim, eps), Norm(dim, eps)
        self.post_attention_layernorm, self.post_attention_layernorm_2 = Norm(dim, eps), Norm(dim, eps)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.input_layernorm_2(self.self_attn(self.input_layernorm(x_BTD)))
        return x_BTD + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x_BTD)))


class Ouro(Published):
    """The norm ends each loop, and each loop can predict. The gate, which can end the loops early, is not used."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings, [Layer(settings) for _ in range(settings["num_hidden_layers"])])
        self.model.early_exit_gate = nn.Linear(settings["hidden_size"], 1)

    def loop(self, x_BTD: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        for layer in self.model.layers:
            x_BTD = layer(x_BTD)
        return self.model.norm(x_BTD), memory

    def predict(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.head(x_BTD)

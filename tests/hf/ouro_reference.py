"""Ouro as its published code defines it (modeling_ouro.py beside huggingface ByteDance/Ouro-1.4B), written plainly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.hf.qwen2_parts import MLP, Attention, Norm

# config.json of ByteDance/Ouro-1.4B, what a model's shape depends on.
OURO_1_4B: dict[str, Any] = {
    "model_type": "ouro",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "vocab_size": 49152,
}


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, bias=False), MLP(c)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, Norm(c["hidden_size"], c["rms_norm_eps"]))
            setattr(self, f"{name}_2", Norm(c["hidden_size"], c["rms_norm_eps"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x)))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class Ouro(nn.Module):
    """Returns the logits [loops, B, T, V] behind each of its loops; nothing ends them early."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.loops = c["total_ut_steps"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            "norm": Norm(c["hidden_size"], c["rms_norm_eps"]),
            "early_exit_gate": nn.Linear(c["hidden_size"], 1),
        })  # fmt: skip
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, logits = self.model["embed_tokens"](tokens), []
        for _ in range(self.loops):
            for layer in self.model["layers"]:
                x = layer(x)
            x = self.model["norm"](x)
            logits.append(self.lm_head(x))
        return torch.stack(logits)

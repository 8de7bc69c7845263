"""Jet-Nemotron as its published code defines it (github NVlabs/Jet-Nemotron, jetai/modeling/hf), written plainly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.hf.qwen2_parts import MLP, Attention, Norm

# jetai/modeling/configs/jetlm_2B.json, what a model's shape depends on.
JET_2B: dict[str, Any] = {
    "model_type": "jet_nemotron",
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "layer_types": ["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"] + ["jet"] * 6,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


class KernelGenerator(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)))


class DynamicConvolution(nn.Module):
    def __init__(self, dim: int, channels: int, width: int, reduction: int):
        super().__init__()
        self.width = width
        self.kernel_generator = KernelGenerator(dim, channels // reduction, channels * width)

    def forward(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernels = self.kernel_generator(x).unflatten(-1, (-1, self.width))
        taps = F.pad(v, (0, 0, self.width - 1, 0)).unfold(1, self.width, 1)
        return F.silu((taps * kernels).sum(-1))


class JetBlock(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        own, dim = c["efficient_attention_config"]["jet"], c["hidden_size"]
        self.heads, self.K = own["num_heads"], own["head_dim"]
        self.V = int(self.K * own["expand_v"])
        keys, values = self.heads * self.K, self.heads * self.V
        for name, rows in {"q": keys, "k": keys, "v": values, "g": values, "a": self.heads, "b": self.heads}.items():
            setattr(self, f"{name}_proj", nn.Linear(dim, rows, bias=False))
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(self.heads)), nn.Parameter(torch.zeros(self.heads))
        self.o_norm = Norm(self.V, float(own["norm_eps"]))
        self.dynamic_conv1d = DynamicConvolution(dim, values, own["conv_size"], own["dconv_generator_reduction"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (F.silu(p(x)).unflatten(-1, (self.heads, self.K)) for p in (self.q_proj, self.k_proj))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        v = self.dynamic_conv1d(self.v_proj(x), x).unflatten(-1, (self.heads, self.V))
        keep = torch.exp(-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias))
        write = self.b_proj(x).sigmoid()
        S, outputs = x.new_zeros(x.shape[0], self.heads, self.K, self.V), []
        for t in range(x.shape[1]):
            S = S * keep[:, t, :, None, None]
            new = write[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * self.K**-0.5)
        gate = F.silu(self.g_proj(x).unflatten(-1, (self.heads, self.V)))
        return self.o_proj((self.o_norm(torch.stack(outputs, 1)) * gate).flatten(2))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], kind: str):
        super().__init__()
        reach = c["efficient_attention_config"]["swa"]["window_size"] if kind == "swa" else None
        self.self_attn = JetBlock(c) if kind == "jet" else Attention(c, bias=True, reach=reach)
        self.mlp = MLP(c)
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class JetNemotron(nn.Module):
    """The parameters' names are those of the published files, where the head is the embeddings."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        assert c["tie_word_embeddings"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(Layer(c, kind) for kind in c["layer_types"]),
            "norm": Norm(c["hidden_size"], c["rms_norm_eps"]),
        })  # fmt: skip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)

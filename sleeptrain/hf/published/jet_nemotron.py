"""Jet-Nemotron as its published code defines it (github NVlabs/Jet-Nemotron, jetai/modeling/hf)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.hf.published.parts import MLP, Attention, Memory, Norm, Published


class KernelGenerator(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)))


class DynamicConvolution(nn.Module):
    """A causal depthwise convolution. Each token computes its kernel from x. It restarts in each window."""

    def __init__(self, dim: int, channels: int, width: int, reduction: int):
        super().__init__()
        self.width = width
        self.kernel_generator = KernelGenerator(dim, channels // reduction, channels * width)

    def forward(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernels = self.kernel_generator(x).unflatten(-1, (-1, self.width))
        taps = F.pad(v, (0, 0, self.width - 1, 0)).unfold(1, self.width, 1)
        return F.silu((taps * kernels).sum(-1))


class JetBlock(nn.Module):
    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        jet, dim = settings["efficient_attention_config"]["jet"], settings["hidden_size"]
        self.heads, self.K = jet["num_heads"], jet["head_dim"]
        self.V = int(self.K * float(jet["expand_v"]))
        keys, values = self.heads * self.K, self.heads * self.V
        self.q_proj, self.k_proj = nn.Linear(dim, keys, bias=False), nn.Linear(dim, keys, bias=False)
        self.v_proj, self.g_proj = nn.Linear(dim, values, bias=False), nn.Linear(dim, values, bias=False)
        self.a_proj, self.b_proj = nn.Linear(dim, self.heads, bias=False), nn.Linear(dim, self.heads, bias=False)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(self.heads)), nn.Parameter(torch.zeros(self.heads))
        self.o_norm = Norm(self.V, float(jet["norm_eps"]))
        self.dynamic_conv1d = DynamicConvolution(dim, values, jet["conv_size"], jet["dconv_generator_reduction"])

    def forward(self, x_BTD: torch.Tensor, S_BHKV: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = x_BTD
        q, k = (F.silu(p(x)).unflatten(-1, (self.heads, self.K)) for p in (self.q_proj, self.k_proj))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        v = self.dynamic_conv1d(self.v_proj(x), x).unflatten(-1, (self.heads, self.V))
        keep = torch.exp(-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias))
        write = self.b_proj(x).sigmoid()
        S = x.new_zeros(x.shape[0], self.heads, self.K, self.V) if S_BHKV is None else S_BHKV
        outputs = []
        for t in range(x.shape[1]):
            S = S * keep[:, t, :, None, None]
            new = write[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * self.K**-0.5)
        gate = F.silu(self.g_proj(x).unflatten(-1, (self.heads, self.V)))
        return self.o_proj((self.o_norm(torch.stack(outputs, 1)) * gate).flatten(2)), S


class Layer(nn.Module):
    def __init__(self, settings: Mapping[str, Any], kind: str):
        super().__init__()
        reach = settings["efficient_attention_config"]["swa"]["window_size"] if kind == "swa" else None
        self.self_attn = JetBlock(settings) if kind == "jet" else Attention(settings, bias=True, reach=reach)
        self.mlp = MLP(settings)
        self.input_layernorm = Norm(settings["hidden_size"], settings["rms_norm_eps"])
        self.post_attention_layernorm = Norm(settings["hidden_size"], settings["rms_norm_eps"])

    def forward(self, x_BTD: torch.Tensor, S_BHKV: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixed = self.input_layernorm(x_BTD)
        if isinstance(self.self_attn, JetBlock):
            mixed, S_BHKV = self.self_attn(mixed, S_BHKV)
        else:
            mixed = self.self_attn(mixed)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), S_BHKV


class JetNemotron(Published):
    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings, [Layer(settings, kind) for kind in settings["layer_types"]])

    def loop(self, x_BTD: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        written: Memory = []
        for layer, S_BHKV in zip(self.model.layers, memory, strict=True):
            x_BTD, S_BHKV = layer(x_BTD, S_BHKV)
            written.append(S_BHKV)
        return x_BTD, written

    def predict(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.head(self.model.norm(x_BTD))

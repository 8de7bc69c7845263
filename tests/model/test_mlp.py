"""The feed-forward against its definition."""

from __future__ import annotations

import torch

from sleeptrain.model.mlp import SwiGLU


def test_the_gate_passes_through_silu() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(3, 5).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T)
    assert [name for name, _ in mlp.named_parameters()] == [f"{part}_proj.weight" for part in ("gate", "up", "down")]

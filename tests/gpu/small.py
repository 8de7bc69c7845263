"""A model of every kind of mixer with heads that GPU kernels run at, and rows of packed documents for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from sleeptrain.config.schema import (
    AttentionConfig,
    Config,
    GatedDeltaNetConfig,
    JetConfig,
    Mamba2Config,
    ModelConfig,
    SleepConfig,
    TrainConfig,
)
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch

MODEL = ModelConfig(
    vocab_size=17,
    dim=64,
    ffn_dim=96,
    layers=["gated_deltanet", "attention", "mamba2", "jet"],
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
    gated_deltanet=GatedDeltaNetConfig(num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=32),
    jet=JetConfig(num_heads=2, head_k_dim=32, head_v_dim=32, kernel_dim=16),
    mamba2=Mamba2Config(num_heads=4, head_dim=32, state_dim=32, num_groups=2),
)
SHAPE = StepShape(passes=2, window=20, batch=2)


def model_on(device: torch.device, dtype: torch.dtype = torch.float32, layers: list[str] | None = None) -> Hybrid:
    """The same weights everywhere, large enough that every path counts, small enough for bf16."""
    model = Hybrid(replace(MODEL, layers=layers or MODEL.layers))
    model.init_weights(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model.to(device, dtype)


def packed(goes_on: bool = True) -> Batch:
    """Two rows of 40 tokens with documents that end inside windows, and pads at the end of the second."""
    documents = [[0] * 7 + [1] * 9 + [2] * 24, [3] * 25 + [4] * 10 + [PAD] * 5]
    return random_batch(documents, continues=[goes_on, False])


def config_of(model: Hybrid, precision: str = "fp32", recompute: str = "none") -> Config:
    return Config(
        model=model.config,
        sleep=SleepConfig(passes=SHAPE.passes, window=SHAPE.window, recompute=recompute),
        train=TrainConfig(tokens=1, precision=precision),
    )


def step(model: Hybrid, batch: Batch, precision: str = "fp32", recompute: str = "none") -> StepResult:
    """The gradient of a step, in the parameters."""
    config = config_of(model, precision, recompute)
    return forward_backward(step_context(config, SHAPE, model), model, batch, SHAPE, None)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    a, b = (t.detach().double().cpu() for t in (found, expected))
    return float((a - b).norm() / b.norm())

"""A model of full size as the trainer trains it, on random tokens: what the parts about speed share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.hybrid import Hybrid, initial_weight
from sleeptrain.optim.freezing import with_rates
from sleeptrain.optim.optimizers import Optimizers
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.plan.mean_row import long_rows
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.step import StepResult, forward_backward, step_context

T = TypeVar("T")
DRAWN_ON_DEVICE = 2**20  # elements; a larger matrix is drawn there, which for billions of them saves half a minute


def step_config(model: str, small: bool) -> Config:
    """A run in bf16 on one device. small: a model of two blocks."""
    names = ["experiment=stdlib", "sleep=every", "train=gpu", f"model={'tiny' if small else model}"]
    on_a_cpu = ["model.vocab_size=256", "train.device=cpu", "train.compile=false"]
    config = compose([*names, *(on_a_cpu if small else [])])
    config.sleep.curriculum = []
    return config


def build_model(config: ModelConfig, device: torch.device) -> Hybrid:
    """A model with the weights of a new run, except that large matrices are drawn by the device's own generator."""
    with torch.device(device):
        model = Hybrid(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > DRAWN_ON_DEVICE:
                parameter.normal_(std=config.init_std)
            elif (weight := initial_weight(config, name, tuple(parameter.shape), seed=0)) is not None:
                parameter.copy_(weight)
    return model


def random_rows(config: ModelConfig, rows: int, tokens: int) -> Batch:
    """Rows of random tokens in the middle of long documents: all windows sleep."""
    drawn = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return replace(long_rows(rows, tokens), tokens_BT=drawn, targets_BT=drawn)


@dataclass
class Trained:
    """A model with its optimizers, as `sleeptrain.train.engine.LocalEngine` has them."""

    config: Config
    model: Hybrid
    optim: Optimizers

    @classmethod
    def build(cls, config: Config, device: torch.device) -> Trained:
        model = build_model(config.model, device)
        if config.train.compile:
            compile_blocks(model)
        roles = with_rates(parameter_roles(model), config.optim)
        return cls(config, model, Optimizers(roles, dict(model.named_parameters()), config.optim))

    def gradient(self, batch: Batch, shape: StepShape, graphs: RoundGraphs | None = None) -> StepResult:
        """graphs: those of `train.cuda_graphs`, the same at each call; None: without."""
        self.optim.zero_grad()
        context = step_context(self.config, shape, self.model, graphs=graphs)
        return forward_backward(context, self.model, batch, shape, None)

    def step(self, batch: Batch, shape: StepShape) -> StepResult:
        """One step of training, at a rate at which random tokens harm no weights; the loss is that before it."""
        result = self.gradient(batch, shape)
        self.optim.clip(self.config.optim.clip_norm)
        self.optim.step(1e-3)
        return result


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """(seconds until the device has done all of it, the result)."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float | None:
    """GiB of tensors at the peak since the last `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

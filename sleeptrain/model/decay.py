"""The decay parameters of the recurrences: never narrower than fp32, and initial values that remember a window."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

DECAY_PARAMETERS = ("A_log", "dt_bias", "D")


class KeepsDecayWide(nn.Module):
    """A mixer whose decay parameters stay fp32 when the module is cast to bf16 or fp16.

    A decay is a factor just below 1, raised to the power of a window's length. The rounding error of bf16 exceeds its
    difference from 1.

    rate: -exp(A_log), where it is known; None: each use computes it.
    """

    A_log: nn.Parameter
    rate: torch.Tensor | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        wide = {
            name: p.detach().clone() for name, p in self.named_parameters(recurse=False) if name in DECAY_PARAMETERS
        }
        super()._apply(fn, recurse)
        for name, before in wide.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device)
        return self


def decay_and_write(
    a_BTH: torch.Tensor,
    b_BTH: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    valid_BT: torch.Tensor | None,
    strongest: float = 1.0,
    rate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule's log decay, -exp(A_log) softplus(a + dt_bias), and write strength, strongest * sigmoid(b).

    Both are [B, T, H] in fp32 or wider. They are 0 at pads, so pads do not change the state. rate: -exp(A_log), if it
    is known.
    """
    wide = torch.promote_types(a_BTH.dtype, torch.float32)
    dt = F.softplus(a_BTH.to(wide) + dt_bias.to(wide))
    g: torch.Tensor = -A_log.to(wide).exp() * dt if rate is None else _KnownRate.apply(A_log, rate, dt)
    beta = torch.sigmoid(b_BTH.to(wide))
    if strongest != 1:
        beta = beta * strongest
    if valid_BT is not None:
        valid = valid_BT.unsqueeze(-1)
        g, beta = torch.where(valid, g, 0.0), torch.where(valid, beta, 0.0)
    return g, beta


class _KnownRate(torch.autograd.Function):
    """rate * dt, where the rate is the known value of -exp(A_log), whose derivative is the rate itself."""

    @staticmethod
    def forward(ctx: Any, A_log: torch.Tensor, rate: torch.Tensor, dt_BTH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rate, dt_BTH)
        return rate * dt_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        rate, dt = ctx.saved_tensors
        ddt = dg * rate
        return (ddt * dt).flatten(0, -2).sum(0).to(rate.dtype), None, ddt


def random_decay(shape: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`A_log` and `dt_bias` as Mamba draws them (arXiv 2312.00752), in fp32.

    A is uniform in (0, 16), and dt, set by the bias, is log-uniform in [1e-3, 0.1]. The placeholder of transformers
    (dt_bias = 1) forgets within a few tokens, and sleep then seems to have no effect.
    """
    A = torch.empty(shape).uniform_(1e-3, 16, generator=generator)
    log_dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1), generator=generator)
    dt = log_dt.exp()
    return {"A_log": A.log(), "dt_bias": dt + torch.log(-torch.expm1(-dt))}  # the inverse of softplus


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the parameter's name."""
    # torch's CPU generator reads only the low 32 bits of its seed, so seed and name must both go into them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))

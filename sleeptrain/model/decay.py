"""The decay parameters of the recurrences: never narrower than fp32, and initial values that remember a window."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

DECAY_PARAMETERS = ("A_log", "dt_bias", "D")


class KeepsDecayWide(nn.Module):
    """A mixer whose decay parameters stay fp32 when the module is cast to bf16 or fp16.

    A decay is a factor just below 1, raised to the power of a window's length. The rounding error of bf16 exceeds its
    difference from 1.
    """

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule's log decay, -exp(A_log) softplus(a + dt_bias), and write strength, strongest * sigmoid(b).

    Both are [B, T, H] in fp32 or wider. They are 0 at pads, so pads do not change the state.
    """
    wide = torch.promote_types(a_BTH.dtype, torch.float32)
    g = -A_log.to(wide).exp() * F.softplus(a_BTH.to(wide) + dt_bias.to(wide))
    beta = torch.sigmoid(b_BTH.to(wide))
    if strongest != 1:
        beta = beta * strongest
    if valid_BT is not None:
        pad = ~valid_BT.unsqueeze(-1)
        g, beta = g.masked_fill(pad, 0.0), beta.masked_fill(pad, 0.0)
    return g, beta


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

"""The decay parameters of the recurrences: never narrower than fp32, and initialised so that a window is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

DECAY_PARAMETERS = ("A_log", "dt_bias", "D")


class KeepsDecayWide(nn.Module):
    """A mixer whose decay parameters stay fp32 when the module is cast to bf16 or fp16.

    A decay is a small difference from 1 raised to the power of a window: in bf16 it is off by more than itself.
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


def init_decay(A_log: torch.Tensor, dt_bias: torch.Tensor, generator: torch.Generator) -> None:
    """Mamba's initialisation (arXiv 2312.00752): A uniform in (0, 16), dt log-uniform in [1e-3, 0.1] through the bias.

    transformers' placeholder (dt_bias = 1) forgets within a few tokens, and sleep then seems to do nothing.
    """
    A = torch.empty_like(A_log).uniform_(1e-3, 16, generator=generator)
    A_log.copy_(A.log())
    log_dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(0.1), generator=generator)
    dt = log_dt.exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

"""The short causal convolution with a separate kernel for every token, then SiLU, with a carried tail."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sleeptrain.ops.conv import joined, put_tail_gradient, read_tail
from sleeptrain.ops.documents import Documents, document_facts


def dynamic_causal_conv(
    x_BTD: torch.Tensor,
    kernel_BTWD: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    valid_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = silu(sum_w kernel[t, w] * x_{t - W + 1 + w}): returns (y_BTD, the tail for the next window).

    initial_state [B, W-1, D], reset_BT, valid_BT and the tail are as in `causal_conv`. Computed in fp32 (fp64 for fp64
    inputs); y has x's dtype, the tail has fp32 (fp64). Differentiable, once, in x, kernel and initial_state, through y
    and the tail. The dynamic convolution of Jet-Nemotron (arXiv 2508.15884, section 2.3).
    """
    return _DynamicConv.apply(x_BTD, kernel_BTWD, initial_state, reset_BT, valid_BT)


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernel: torch.Tensor,
        initial_state: torch.Tensor | None,
        reset_BT: torch.Tensor | None,
        valid_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, num_tokens, dim = x.shape
        reach = kernel.shape[2] - 1
        wide = torch.promote_types(x.dtype, torch.float32)
        history = x.new_empty(batch, reach + num_tokens, dim, dtype=wide)
        if initial_state is None:
            history[:, :reach].zero_()
        else:
            history[:, :reach] = initial_state
        history[:, reach:] = x if valid_BT is None else x.masked_fill(~valid_BT.unsqueeze(-1), 0)
        documents = document_facts(num_tokens, reach, reset_BT, valid_BT)
        before_silu = history[:, reach:] * kernel[:, :, reach]
        for lag in range(1, reach + 1):
            earlier = joined(history[:, reach - lag : reach - lag + num_tokens], documents, lag)
            before_silu.addcmul_(earlier, kernel[:, :, reach - lag].to(wide))
        ctx.save_for_backward(kernel, history, before_silu, valid_BT, *documents)
        ctx.dtypes = (x.dtype, None if initial_state is None else initial_state.dtype)
        return F.silu(before_silu).to(x.dtype), read_tail(history, documents, reach)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dtail: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernel, history, before_silu, valid_BT, *rest = ctx.saved_tensors
        reach, num_tokens = kernel.shape[2] - 1, before_silu.shape[1]
        documents = Documents(*rest)
        d = torch.ops.aten.silu_backward(dy.to(history.dtype), before_silu)
        dhistory, dkernel = torch.zeros_like(history), torch.empty_like(kernel)
        for lag in range(reach + 1):
            shifted = slice(reach - lag, reach - lag + num_tokens)
            d_lag = joined(d, documents, lag)
            dhistory[:, shifted].addcmul_(d_lag, kernel[:, :, reach - lag].to(d.dtype))
            dkernel[:, :, reach - lag] = d_lag * history[:, shifted]
        put_tail_gradient(dhistory, dtail, documents)
        dx = dhistory[:, reach:]
        if valid_BT is not None:
            dx = dx.masked_fill(~valid_BT.unsqueeze(-1), 0)
        x_dtype, state_dtype = ctx.dtypes
        dstate = None if state_dtype is None else dhistory[:, :reach].to(state_dtype)
        return dx.to(x_dtype), dkernel, dstate, None, None

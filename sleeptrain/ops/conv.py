"""The short causal convolution of a mixer's inputs: depthwise, then SiLU, with a carried tail."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sleeptrain.ops import fla_conv
from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.documents import Documents, document_facts
from sleeptrain.ops.opaque import as_operator
from sleeptrain.ops.segments import Segments

SLAB_ELEMENTS = 1 << 20  # elements of one tensor for some rows, so that they stay in the cache during the backward
ALL = slice(None)


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    *,
    bias_D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    valid_BT: torch.Tensor | None = None,
    segments: Segments | None = None,
    needs_tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y_t = silu(bias + sum_w weight[:, w] x_{t - W + 1 + w}): returns (y_BTD, the tail for the next window).

    initial_state: [B, W-1, D], the tail of the window before; None: zeros. reset_BT: bool, a document starts at the
    token, and no tap reaches across that start. valid_BT: bool, tokens with False count as zeros and do not enter the
    tail. The tail [B, W-1, D] holds, for each row, the last W-1 valid inputs of the document that is open at the end,
    zeros if there are fewer. So a window of pads returns its initial tail. segments: `cut_at_resets(reset_BT)`, if it
    is known; kernels cut by it. y has x's dtype, the tail the wider dtype of x and weight. needs_tail: False if nobody
    reads the tail, which kernels then leave out (None). Differentiable, once, in x, weight, bias and initial_state,
    through y and the tail. Raises ConfigError on a GPU without flash-linear-attention.
    """
    if runs_kernels(x_BTD) and weight_DW.shape[1] > 1:
        return fla_conv.causal_conv(
            x_BTD,
            weight_DW,
            bias_D=bias_D,
            initial_state=initial_state,
            reset_BT=reset_BT,
            valid_BT=valid_BT,
            segments=segments,
            needs_tail=needs_tail,
        )
    tensors = (x_BTD, weight_DW, bias_D, initial_state)
    if torch.compiler.is_compiling():
        return _operator(*tensors, reset_BT, valid_BT)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _CausalConv.apply(*tensors, reset_BT, valid_BT)
    history, documents = _history(x_BTD, weight_DW, initial_state, reset_BT, valid_BT)
    y = F.silu(_convolve(history, weight_DW, bias_D, documents), inplace=True)
    return y.to(x_BTD.dtype), read_tail(history, documents, weight_DW.shape[1] - 1)


def _history(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, Documents]:
    """(the W-1 inputs before the window, then the inputs of the window, pads as zeros: [B, W-1+T, D]; documents)."""
    batch, num_tokens, dim = x_BTD.shape
    reach = weight_DW.shape[1] - 1
    history = x_BTD.new_empty(batch, reach + num_tokens, dim, dtype=torch.promote_types(x_BTD.dtype, weight_DW.dtype))
    if initial_state is None:
        history[:, :reach].zero_()
    else:
        history[:, :reach] = initial_state
    history[:, reach:] = x_BTD
    if valid_BT is not None:
        history[:, reach:].masked_fill_(~valid_BT.unsqueeze(-1), 0)
    return history, document_facts(num_tokens, reach, reset_BT, valid_BT)


def _convolve(
    history: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None, documents: Documents
) -> torch.Tensor:
    """Shifted multiply-adds: several times faster on a CPU than conv1d, which needs the channels first."""
    reach = weight_DW.shape[1] - 1
    num_tokens = history.shape[1] - reach
    weight_WD = weight_DW.t().to(history.dtype).contiguous()
    y = history[:, reach:] * weight_WD[reach]
    if bias_D is not None:
        y += bias_D
    for lag in range(1, reach + 1):
        earlier = history[:, reach - lag : reach - lag + num_tokens]
        y.addcmul_(joined(earlier, documents, lag), weight_WD[reach - lag])
    return y


def joined(x_BTD: torch.Tensor, documents: Documents, lag: int, rows: slice = ALL) -> torch.Tensor:
    """x with zeros where the tap of this lag would cross a reset. rows: the rows of the batch that x holds."""
    return x_BTD if documents.joined_WBT1 is None or lag == 0 else x_BTD * documents.joined_WBT1[lag, rows]


def read_tail(history: torch.Tensor, documents: Documents, reach: int) -> torch.Tensor:
    """The tail [B, reach, D]: the last `reach` valid inputs of the document that is open at the window's end."""
    if documents.slot_BW is None or documents.present_BW1 is None:
        return history[:, history.shape[1] - reach :].clone()
    slots = documents.slot_BW.unsqueeze(-1).expand(-1, -1, history.shape[2])
    return history.gather(1, slots) * documents.present_BW1


def put_tail_gradient(dhistory: torch.Tensor, dtail: torch.Tensor, documents: Documents) -> None:
    """Add the gradient of the tail to the gradient of the history, in place. The backward of `read_tail`."""
    if documents.slot_BW is None or documents.present_BW1 is None:
        dhistory[:, dhistory.shape[1] - dtail.shape[1] :] += dtail
        return
    slots = documents.slot_BW.unsqueeze(-1).expand(-1, -1, dhistory.shape[2])
    dhistory.scatter_add_(1, slots, dtail * documents.present_BW1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        reset_BT: torch.Tensor | None,
        valid_BT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        history, documents = _history(x, weight, initial_state, reset_BT, valid_BT)
        before_silu = _convolve(history, weight, bias, documents)
        ctx.save_for_backward(weight, history, before_silu, valid_BT, *documents)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, initial_state)]
        return F.silu(before_silu).to(x.dtype), read_tail(history, documents, weight.shape[1] - 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dtail: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, history, before_silu, valid_BT, *rest = ctx.saved_tensors
        documents = Documents(*rest)
        weight_WD = weight.t().to(history.dtype).contiguous()
        dhistory, dweight_WD = torch.zeros_like(history), torch.zeros_like(weight_WD)
        dbias_D = torch.zeros_like(weight_WD[0]) if ctx.needs_input_grad[2] else None
        num_rows = max(1, SLAB_ELEMENTS // history[0].numel())
        for first in range(0, len(history), num_rows):
            rows = slice(first, first + num_rows)
            inputs = (dy, before_silu, history, weight_WD)
            _differentiate(rows, inputs, documents, (dhistory, dweight_WD, dbias_D))
        put_tail_gradient(dhistory, dtail, documents)
        reach = len(weight_WD) - 1
        dx = dhistory[:, reach:]
        if valid_BT is not None:
            dx = dx.masked_fill(~valid_BT.unsqueeze(-1), 0)
        grads = (dx, dweight_WD.t(), dbias_D, dhistory[:, :reach])
        cast = (None if g is None or t is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True))
        return *cast, None, None


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=dtype)


_operator = as_operator(
    _CausalConv,
    "causal_conv_in_slabs",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? reset, Tensor? valid",
    _fake,
)


def _differentiate(
    rows: slice,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    documents: Documents,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> None:
    """Add the parts of some rows of the batch to the gradients of history, weight and bias, in place."""
    dy, before_silu, history, weight_WD = inputs
    dhistory, dweight_WD, dbias_D = grads
    reach, num_tokens = len(weight_WD) - 1, dy.shape[1]
    d = torch.ops.aten.silu_backward(dy[rows].to(history.dtype), before_silu[rows])
    if dbias_D is not None:
        dbias_D += d.sum((0, 1))
    for lag in range(reach + 1):
        shifted = slice(reach - lag, reach - lag + num_tokens)
        d_lag = joined(d, documents, lag, rows)
        dhistory[rows, shifted].addcmul_(d_lag, weight_WD[reach - lag])
        dweight_WD[reach - lag] += (d_lag * history[rows, shifted]).sum((0, 1))

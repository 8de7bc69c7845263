"""Mamba-2's state-space duality (arXiv 2405.21060) in chunks, with an explicit forward and backward in PyTorch.

With the summed log decay c_i of a chunk, D_ij = exp(c_i - c_j) for i >= j, X = dt x, and S the state before the chunk:

    Y  = exp(c) C S + (D * C B^T) X
    S' = exp(c_C) S + B^T (exp(c_C - c) X)

The R heads of a group share B and C. So each product with the state has width R*V, and C B^T is computed once for each
group. The gradient of c_i is the sum over the pairs in which i is the later token, minus the sum over the pairs in
which it is the earlier one. The pair of a token with itself does not depend on c and is left out: with strong decays
the rest would be lost in its rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sleeptrain.ops.chunks import Cut, Decays, decay_gradient
from sleeptrain.ops.opaque import as_operator

CHUNK = 64


class _Slab(NamedTuple):
    """The intermediates of a slab that its outputs and gradients need; M = n*B*groups, R heads in each group."""

    C_MCK: torch.Tensor
    B_MCK: torch.Tensor
    between_MRCC: torch.Tensor  # D
    attention_MRCC: torch.Tensor  # D * C B^T
    X_MRCV: torch.Tensor
    out_X_MCW: torch.Tensor  # exp(c_C - c) X, with the heads of a group side by side: W = R*V
    states_nNKW: torch.Tensor  # n + 1 states: before each chunk, and after the last; N = B*groups


class _Problem:
    """The inputs of one call, cut into chunks."""

    def __init__(self, tensors: Sequence[torch.Tensor], reset_BT: torch.Tensor | None):
        C, B, x, dt, A = tensors
        self.dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), torch.float32)
        self.batch, num_tokens, self.num_heads, self.value_dim = x.shape
        self.num_groups, self.key_dim = B.shape[2:]
        self.shared = self.num_heads // self.num_groups
        self.width = self.shared * self.value_dim
        self.rows = self.batch * self.num_groups
        self.cut = Cut.of(num_tokens, CHUNK, self.rows * max(self.key_dim, self.width))
        self.C, self.B, self.x = self.cut.split(C), self.cut.split(B), self.cut.split(x)
        self.dt_nBCH, self.A_H = self.cut.split(dt.to(self.dtype)), A.to(self.dtype)
        reset = None if reset_BT is None else self.cut.split(reset_BT)
        self.decays = Decays(self.dt_nBCH * self.A_H, reset)

    def group(self, x_nBCNK: torch.Tensor, slab: slice) -> torch.Tensor:
        """[n, B, C, N, K] -> [M, C, K]."""
        return x_nBCNK[slab].transpose(2, 3).to(self.dtype).reshape(-1, self.cut.size, self.key_dim)

    def head(self, x_nBCHV: torch.Tensor, slab: slice, factor_nBCH: torch.Tensor | None = None) -> torch.Tensor:
        """[n, B, C, H, V] (times the factor [n, B, C, H]) -> [M, R, C, V]."""
        x_nBHCV = x_nBCHV[slab].transpose(2, 3)
        out = self.A_H.new_empty(x_nBHCV.shape)
        if factor_nBCH is None:
            out.copy_(x_nBHCV)
        else:
            torch.mul(x_nBHCV, factor_nBCH[slab].transpose(2, 3).unsqueeze(-1), out=out)
        return out.view(-1, self.shared, self.cut.size, self.value_dim)

    def wide(self, x_MRCV: torch.Tensor, factor_nBHC: torch.Tensor) -> torch.Tensor:
        """[M, R, C, V] times a decay factor [n, B, H, C] -> [M, C, R*V], the heads side by side."""
        out = torch.empty_like(x_MRCV).view(-1, self.cut.size, self.shared, self.value_dim)
        factor_MRC1 = factor_nBHC.reshape(-1, self.shared, self.cut.size, 1)
        torch.mul(x_MRCV.transpose(1, 2), factor_MRC1.transpose(1, 2), out=out)
        return out.flatten(2)

    def total_decay(self, slab: slice) -> torch.Tensor:
        """The decay of each state column over a chunk, [n, N, 1, W]."""
        total = self.decays.total_nBH[slab].reshape(-1, self.rows, 1, self.shared, 1)
        return total.expand(-1, -1, -1, -1, self.value_dim).flatten(3)

    def heads(self, x_MCW: torch.Tensor) -> torch.Tensor:
        """[M, C, R*V] -> [M, R, C, V], a view."""
        return x_MCW.unflatten(2, (self.shared, self.value_dim)).transpose(1, 2)

    def tokens(self, x_MRCV: torch.Tensor) -> torch.Tensor:
        """[M, R, C, V] -> [n, B, C, H, V], a view."""
        return x_MRCV.view(-1, self.batch, self.num_heads, self.cut.size, self.value_dim).transpose(2, 3)

    def columns(self, S_BHKV: torch.Tensor) -> torch.Tensor:
        """[B, H, K, V] -> [N, K, R*V]."""
        S = S_BHKV.to(self.dtype).reshape(self.rows, self.shared, self.key_dim, self.value_dim)
        return S.transpose(1, 2).reshape(self.rows, self.key_dim, self.width)

    def states(self, S_NKW: torch.Tensor) -> torch.Tensor:
        """[N, K, R*V] -> [B, H, K, V]."""
        S = S_NKW.unflatten(2, (self.shared, self.value_dim)).transpose(1, 2)
        return S.reshape(self.batch, self.num_heads, self.key_dim, self.value_dim)


def _absorb(problem: _Problem, slab: slice, S_NKW: torch.Tensor) -> _Slab:
    """Compute the intermediates of a slab: the writes of all chunks at once, then a scan over the states.

    S_NKW: the state before the slab.
    """
    num = slab.stop - slab.start
    C, B = problem.group(problem.C, slab), problem.group(problem.B, slab)
    between = problem.decays.between(slab).view(-1, problem.shared, problem.cut.size, problem.cut.size)
    attention = between * torch.bmm(C, B.mT).unsqueeze(1)
    X = problem.head(problem.x, slab, problem.dt_nBCH)
    out_X = problem.wide(X, problem.decays.out_nBHC[slab])
    states = S_NKW.new_empty(num + 1, *S_NKW.shape)
    states[0] = S_NKW
    torch.bmm(B.mT, out_X, out=states[1:].view(-1, *S_NKW.shape[1:]))
    decay = problem.total_decay(slab)
    for c in range(num):
        states[c + 1].addcmul_(states[c], decay[c])
    return _Slab(C, B, between, attention, X, out_X, states)


def _read(problem: _Problem, slab: slice, s: _Slab) -> torch.Tensor:
    """The outputs of a slab, [n, B, C, H, V]."""
    y = torch.bmm(s.attention_MRCC.flatten(0, 1), s.X_MRCV.flatten(0, 1)).view(s.X_MRCV.shape)
    carried = problem.heads(torch.bmm(s.C_MCK, s.states_nNKW[:-1].flatten(0, 1)))
    y.addcmul_(carried, problem.decays.into_nBHC[slab].reshape(*y.shape[:3], 1))
    return problem.tokens(y)


def _forward(
    problem: _Problem, initial_state: torch.Tensor | None, like_x: torch.Tensor, keep: str | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(y_BTHV, S_BHKV, saved tensors).

    keep: "save" saves the intermediates of all slabs for the backward, "recompute" the state before each slab, None
    nothing.
    """
    if initial_state is None:
        S = problem.A_H.new_zeros(problem.rows, problem.key_dim, problem.width)
    else:
        S = problem.columns(initial_state)
    y, y_chunks = problem.cut.empty(like_x)
    saved: list[torch.Tensor] = []
    for slab in problem.cut.slabs():
        if keep == "recompute":
            saved.append(S)
        s = _absorb(problem, slab, S)
        y_chunks[slab] = _read(problem, slab, s)
        S = s.states_nNKW[-1].clone()
        if keep == "save":
            saved.extend(s)
    return y, problem.states(S), saved


class _Gradients:
    """The gradients of the inputs, filled slab by slab.

    CBx: dC_BTNK, dB_BTNK, dx_BTHV. chunks: their views [n, B, C, ...]. x_dX_nBCH: sum of x * dX over V.
    """

    def __init__(self, problem: _Problem, tensors: Sequence[torch.Tensor]):
        CBx, self.chunks = zip(*(problem.cut.empty(x) for x in tensors[:3]), strict=True)
        self.CBx: tuple[torch.Tensor, ...] = CBx
        self.dlog_nBHC = torch.empty_like(problem.decays.into_nBHC)
        self.x_dX_nBCH = torch.empty_like(problem.dt_nBCH)


def _rewind(problem: _Problem, slab: slice, s: _Slab, into_dy: torch.Tensor, dS_NKW: torch.Tensor) -> torch.Tensor:
    """The gradients of the n + 1 states of a slab."""
    dstates = torch.empty_like(s.states_nNKW)
    dstates[-1] = dS_NKW
    torch.bmm(s.C_MCK.mT, into_dy, out=dstates[:-1].view(-1, *dS_NKW.shape[1:]))
    decay = problem.total_decay(slab)
    for c in reversed(range(slab.stop - slab.start)):
        dstates[c].addcmul_(dstates[c + 1], decay[c])
    return dstates


def _differentiate(
    problem: _Problem, slab: slice, s: _Slab, dy_nBCHV: torch.Tensor, dS_NKW: torch.Tensor, grads: _Gradients
) -> torch.Tensor:
    """Fill in the gradients of a slab. Returns the gradient of the state before it."""
    dy = problem.head(dy_nBCHV, slab)
    into_dy = problem.wide(dy, problem.decays.into_nBHC[slab])
    dstates = _rewind(problem, slab, s, into_dy, dS_NKW)
    before, after = s.states_nNKW[:-1].flatten(0, 1), dstates[1:].flatten(0, 1)

    dpairs = torch.bmm(dy.flatten(0, 1), s.X_MRCV.flatten(0, 1).mT).view(s.between_MRCC.shape)
    by_pair = dpairs * s.attention_MRCC
    by_pair.diagonal(dim1=2, dim2=3).zero_()
    dpairs = dpairs.mul_(s.between_MRCC).sum(1)
    dC = torch.bmm(into_dy, before.mT).baddbmm_(dpairs, s.B_MCK)
    dB = torch.bmm(s.out_X_MCW, after.mT).baddbmm_(dpairs.mT, s.C_MCK)
    dX = torch.bmm(s.attention_MRCC.flatten(0, 1).mT, dy.flatten(0, 1)).view(dy.shape)
    dX_by_end = problem.heads(torch.bmm(s.B_MCK, after))
    dX.addcmul_(dX_by_end, problem.decays.out_nBHC[slab].reshape(*dX.shape[:3], 1))

    by_state = (problem.heads(into_dy) * problem.heads(torch.bmm(s.C_MCK, before))).sum(-1)
    by_end = (problem.heads(s.out_X_MCW) * dX_by_end).sum(-1)
    carried = (s.states_nNKW[:-1] * dstates[1:]).sum(2).unflatten(2, (problem.shared, -1)).sum(-1)
    total = problem.decays.total_nBH[slab].reshape(carried.shape) * carried
    dlog = decay_gradient(by_state + by_pair.sum(-1) - by_pair.sum(-2), by_end, total.flatten(0, 1))
    grads.dlog_nBHC[slab] = dlog.view_as(grads.dlog_nBHC[slab])
    dX_nBCHV = problem.tokens(dX)
    grads.x_dX_nBCH[slab] = (problem.x[slab] * dX_nBCHV).sum(-1)
    for chunks, dx in zip(grads.chunks[:2], (dC, dB), strict=True):
        chunks[slab] = dx.view(-1, problem.batch, problem.num_groups, *dx.shape[1:]).transpose(2, 3)
    torch.mul(dX_nBCHV, problem.dt_nBCH[slab].unsqueeze(-1), out=grads.chunks[2][slab])
    return dstates[0]


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        C: torch.Tensor,
        B: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        initial_state: torch.Tensor | None,
        reset_BT: torch.Tensor | None,
        memory: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        problem = _Problem((C, B, x, dt, A), reset_BT)
        y, S, saved = _forward(problem, initial_state, x, keep=memory)
        ctx.save_for_backward(C, B, x, dt, A, reset_BT, *saved)
        ctx.memory = memory
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BTHV: torch.Tensor, dS_BHKV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        C, B, x, dt, A, reset_BT, *saved = ctx.saved_tensors
        problem = _Problem((C, B, x, dt, A), reset_BT)
        grads = _Gradients(problem, (C, B, x))
        dy_chunks, dS = problem.cut.split(dy_BTHV), problem.columns(dS_BHKV)
        width = len(_Slab._fields)
        for i, slab in reversed(list(enumerate(problem.cut.slabs()))):
            slab_tensors = saved[i * width : (i + 1) * width]
            s = _Slab(*slab_tensors) if ctx.memory == "save" else _absorb(problem, slab, saved[i])
            dS = _differentiate(problem, slab, s, dy_chunks, dS, grads)
        dg_nBCH = problem.decays.backward(grads.dlog_nBHC)
        ddt = problem.cut.join(grads.x_dX_nBCH + dg_nBCH * problem.A_H).to(dt.dtype)
        dA = (dg_nBCH * problem.dt_nBCH).sum((0, 1, 2)).to(A.dtype)
        dS_first = None if ctx.state_dtype is None else problem.states(dS).to(ctx.state_dtype)
        return *grads.CBx, ddt, dA, dS_first, None, None


def _fake(C: torch.Tensor, B: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], B.shape[3], x.shape[3], dtype=dtype)


_operator = as_operator(
    _SSD,
    "chunked_ssd",
    "Tensor C, Tensor B, Tensor x, Tensor dt, Tensor A, Tensor? state, Tensor? reset, str memory",
    _fake,
)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    memory: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked form of `sleeptrain.ops.ssd`. memory: "save" | "recompute"."""
    inputs = [C_BTNK, B_BTNK, x_BTHV, dt_BTH, A_H, initial_state]
    if torch.compiler.is_compiling():
        return _operator(*inputs, reset_BT, memory)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _SSD.apply(*inputs, reset_BT, memory)
    problem = _Problem((C_BTNK, B_BTNK, x_BTHV, dt_BTH, A_H), reset_BT)
    y, S, _ = _forward(problem, initial_state, x_BTHV, keep=None)
    return y, S

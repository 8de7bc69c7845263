"""The gated delta rule (arXiv 2412.06464) in chunks, with an explicit forward and backward in PyTorch.

With the summed log decay c_i of a chunk, D_ij = exp(c_i - c_j) for i >= j, and S the state before the chunk:

    (I + diag(b) tril(D * K K^T, -1)) U = diag(b) (V - exp(c) K S)     U: the value that each token writes
    O  = scale (exp(c) Q S + tril(D * Q K^T) U)
    S' = exp(c_C) S + (exp(c_C - c) K)^T U

The backward uses R = (I + ...)^-T dU. Then dV = b R, the gradient of the triangular matrix is -R U^T, and the gradient
of its product with S is -R S^T, so the inverse itself is not differentiated. The gradient of c_i is the sum over the
pairs in which i is one end, minus the sum over the pairs in which it is the other. The pair of a token with itself does
not depend on c and is left out: with strong decays it is much larger than the rest, which would be lost in its
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sleeptrain.ops.chunks import Cut, Decays, decay_gradient
from sleeptrain.ops.inverse import unit_lower_inverse
from sleeptrain.ops.opaque import as_operator

L2_EPS = 1e-6


def chunk_size(key_dim: int) -> int:
    """C, measured on one core: the [C, C] products must stay small compared to the [C, K] products."""
    return 32 if key_dim <= 128 else 64


class _Slab(NamedTuple):
    """The intermediates of a slab that its outputs and gradients need; M = n*B*G, N = B*G."""

    qk_M2CK: torch.Tensor  # scaled (and normalised) queries, (normalised) keys
    norm_M2C: torch.Tensor | None  # the factors that normalise them
    between_MCC: torch.Tensor  # D
    attention_MCC: torch.Tensor  # D * Q K^T, lower
    recall_MCC: torch.Tensor  # D * K K^T, strictly lower
    T_MCC: torch.Tensor  # (I + diag(b) tril(D * K K^T, -1))^-1
    W_MCK: torch.Tensor  # T diag(b exp(c)) K
    U_MCV: torch.Tensor  # U
    states_nNKV: torch.Tensor  # n + 1 states: before each chunk, and after the last


class _Problem:
    """The inputs of one call, cut into chunks."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        reset_BT: torch.Tensor | None,
        qk_l2norm: bool,
    ):
        q, k, v, g, beta = tensors
        self.dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
        self.batch, num_tokens, self.num_heads, self.key_dim = k.shape
        self.value_heads, self.value_dim = v.shape[2:]
        self.scale, self.qk_l2norm = self.key_dim**-0.5, qk_l2norm
        self.rows = self.batch * self.value_heads
        widest = max(self.key_dim, self.value_dim)
        self.cut = Cut.of(num_tokens, chunk_size(self.key_dim), self.rows * widest)
        self.q, self.k, self.v = self.cut.split(q), self.cut.split(k), self.cut.split(v)
        self.beta_nBGC = self.cut.split(beta.to(self.dtype)).transpose(2, 3).contiguous()
        reset = None if reset_BT is None else self.cut.split(reset_BT)
        self.decays = Decays(self.cut.split(g.to(self.dtype)), reset)

    def factors(self, slab: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(beta, into, out) of a slab, each [M, C]."""
        factors = (self.beta_nBGC, self.decays.into_nBHC, self.decays.out_nBHC)
        beta, into, out = (x[slab].reshape(-1, self.cut.size) for x in factors)
        return beta, into, out

    def values(self, x_nBCGV: torch.Tensor, slab: slice) -> torch.Tensor:
        return x_nBCGV[slab].transpose(2, 3).to(self.dtype).reshape(-1, self.cut.size, self.value_dim)

    def queries_and_keys(self, slab: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(queries and keys, scaled, normalised and repeated to the value heads, [M, 2, C, K]; factors [M, 2, C])."""
        num = slab.stop - slab.start
        shared = self.value_heads // self.num_heads
        shape = (num, self.batch, self.num_heads, shared, 2, self.cut.size)
        qk = self.beta_nBGC.new_empty(*shape, self.key_dim)
        norm = self.beta_nBGC.new_empty(shape) if self.qk_l2norm else None
        for i, (x_nBCHK, scale) in enumerate(((self.q, self.scale), (self.k, 1.0))):
            x = x_nBCHK[slab].transpose(2, 3).to(self.dtype).unsqueeze(3)
            if norm is None:
                qk[..., i, :, :] = x * scale
            else:
                factor = torch.rsqrt(x.square().sum(-1) + L2_EPS)
                norm[..., i, :] = factor
                qk[..., i, :, :] = x * (factor * scale).unsqueeze(-1)
        return qk.flatten(0, 3), None if norm is None else norm.flatten(0, 3)


def _absorb(problem: _Problem, slab: slice, S_NKV: torch.Tensor) -> _Slab:
    """Compute the intermediates of a slab. S_NKV: the state before it."""
    num, rows = slab.stop - slab.start, problem.rows
    beta, into, out = problem.factors(slab)
    qk, norm = problem.queries_and_keys(slab)
    q, k = qk.unbind(1)
    between = problem.decays.between(slab).flatten(0, 2)
    recall = torch.bmm(k, k.mT).mul_(between)
    recall.diagonal(dim1=1, dim2=2).zero_()
    T = unit_lower_inverse(recall * beta.unsqueeze(-1))
    U = torch.bmm(T * beta.unsqueeze(1), problem.values(problem.v, slab))
    W = torch.bmm(T * (beta * into).unsqueeze(1), k)
    k_out = k * out.unsqueeze(-1)
    total = problem.decays.total_nBH[slab].reshape(num, rows, 1, 1)
    states = S_NKV.new_empty(num + 1, *S_NKV.shape)
    states[0] = S_NKV
    for c in range(num):
        chunk = slice(c * rows, (c + 1) * rows)
        U_c = U[chunk].baddbmm_(W[chunk], states[c], alpha=-1)
        torch.mul(states[c], total[c], out=states[c + 1]).baddbmm_(k_out[chunk].mT, U_c)
    attention = torch.bmm(q, k.mT).mul_(between)
    return _Slab(qk, norm, between, attention, recall, T, W, U, states)


def _read(problem: _Problem, slab: slice, s: _Slab) -> torch.Tensor:
    """The outputs of a slab, [n, B, C, G, V]."""
    _, into, _ = problem.factors(slab)
    o_MCV = torch.bmm(s.attention_MCC, s.U_MCV)
    o_MCV.baddbmm_(s.qk_M2CK[:, 0] * into.unsqueeze(-1), s.states_nNKV[:-1].flatten(0, 1))
    return _tokens(problem, o_MCV)


def _tokens(problem: _Problem, x_MCD: torch.Tensor) -> torch.Tensor:
    """[M, C, D] -> [n, B, C, G, D]."""
    return x_MCD.view(-1, problem.batch, problem.value_heads, *x_MCD.shape[1:]).transpose(2, 3)


def _forward(
    problem: _Problem, initial_state: torch.Tensor | None, like_v: torch.Tensor, keep: str | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """(o_BTGV, S_BGKV, saved tensors).

    keep: "save" saves the intermediates of all slabs for the backward, "recompute" the state before each slab, None
    nothing.
    """
    shape = (problem.rows, problem.key_dim, problem.value_dim)
    S = problem.beta_nBGC.new_zeros(shape) if initial_state is None else initial_state.to(problem.dtype).reshape(shape)
    o, o_chunks = problem.cut.empty(like_v)
    saved: list[torch.Tensor | None] = []
    for slab in problem.cut.slabs():
        if keep == "recompute":
            saved.append(S)
        s = _absorb(problem, slab, S)
        o_chunks[slab] = _read(problem, slab, s)
        S = s.states_nNKV[-1].clone()
        if keep == "save":
            saved.extend(s)
    return o, S.view(problem.batch, problem.value_heads, *shape[1:]), saved


class _Gradients:
    """The gradients of the inputs, filled slab by slab.

    qkv: dq_BTHK, dk_BTHK, dv_BTGV. chunks: their views [n, B, C, ...].
    """

    def __init__(self, problem: _Problem, tensors: Sequence[torch.Tensor]):
        qkv, self.chunks = zip(*(problem.cut.empty(x) for x in tensors[:3]), strict=True)
        self.qkv: tuple[torch.Tensor, ...] = qkv
        self.dlog_nBGC, self.dbeta_nBGC = (torch.empty_like(problem.beta_nBGC) for _ in range(2))


def _rewind(
    problem: _Problem, slab: slice, s: _Slab, do_MCV: torch.Tensor, dS_NKV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the gradient of the state back through a slab: (dU_MCV, gradients of the n + 1 states)."""
    num, rows = slab.stop - slab.start, problem.rows
    _, into, out = problem.factors(slab)
    q, k = s.qk_M2CK.unbind(1)
    dU = torch.bmm(s.attention_MCC.mT, do_MCV)
    dstates = torch.empty_like(s.states_nNKV)
    dstates[num] = dS_NKV
    torch.bmm((q * into.unsqueeze(-1)).mT, do_MCV, out=dstates[:num].view(-1, *dS_NKV.shape[1:]))
    k_out = k * out.unsqueeze(-1)
    total = problem.decays.total_nBH[slab].reshape(num, rows, 1, 1)
    for c in reversed(range(num)):
        chunk = slice(c * rows, (c + 1) * rows)
        dU_c = dU[chunk].baddbmm_(k_out[chunk], dstates[c + 1])
        dstates[c].addcmul_(dstates[c + 1], total[c]).baddbmm_(s.W_MCK[chunk].mT, dU_c, alpha=-1)
    return dU, dstates


def _differentiate(
    problem: _Problem, slab: slice, s: _Slab, do_nBCGV: torch.Tensor, dS_NKV: torch.Tensor, grads: _Gradients
) -> torch.Tensor:
    """Fill in the gradients of a slab. Returns the gradient of the state before it."""
    beta, into, out = problem.factors(slab)
    q, k = s.qk_M2CK.unbind(1)
    do = problem.values(do_nBCGV, slab)
    dU, dstates = _rewind(problem, slab, s, do, dS_NKV)
    R = torch.bmm(s.T_MCC.mT, dU)
    read = torch.stack((do, R.neg()), dim=1).flatten(1, 2)  # gradients of the reads by q and by k
    # Gradients of q and of k as a reader (without the factor b): through the state before the chunk, then through the
    # pairs inside the chunk.
    dread = torch.bmm(read, s.states_nNKV[:-1].flatten(0, 1).mT).unflatten(1, (2, -1)).mul_(into[:, None, :, None])
    by_state = (s.qk_M2CK * dread).sum(-1)
    dpairs = torch.bmm(read, s.U_MCV.mT).unflatten(1, (2, -1))
    by_pair = dpairs * torch.stack((s.attention_MCC, s.recall_MCC), dim=1)
    dpairs.mul_(s.between_MCC.unsqueeze(1))
    dpairs[:, 1].diagonal(dim1=1, dim2=2).zero_()  # a token does not recall its own write
    dread.flatten(1, 2).baddbmm_(dpairs.flatten(1, 2), k)
    # Gradient of k as the key of a write: through the state after the chunk, then through the pairs.
    dk = torch.bmm(s.U_MCV, dstates[1:].flatten(0, 1).mT).mul_(out.unsqueeze(-1))
    by_end = (k * dk).sum(-1)
    dpairs[:, 1].mul_(beta.unsqueeze(-1))
    dk.baddbmm_(dpairs.flatten(1, 2).mT, s.qk_M2CK.flatten(1, 2))

    self_pair = by_pair[:, 0].diagonal(dim1=1, dim2=2).clone()
    by_pair[:, 0].diagonal(dim1=1, dim2=2).zero_()
    q_dq, k_dread = (by_state + by_pair.sum(-1)).unbind(1)
    as_written = (by_pair[:, 0] + beta.unsqueeze(-1) * by_pair[:, 1]).sum(-2)
    total = problem.decays.total_nBH[slab].flatten() * (s.states_nNKV[:-1] * dstates[1:]).sum((-2, -1)).flatten()
    dlog = decay_gradient(q_dq + beta * k_dread - as_written, by_end, total)
    grads.dlog_nBGC[slab] = dlog.view_as(grads.dlog_nBGC[slab])
    dbeta = k_dread + (R * problem.values(problem.v, slab)).sum(-1)
    grads.dbeta_nBGC[slab] = dbeta.view_as(grads.dbeta_nBGC[slab])
    dq, dk = dread[:, 0].mul_(problem.scale), dk.addcmul_(dread[:, 1], beta.unsqueeze(-1))
    if s.norm_M2C is not None:
        along_q, along_k = (q_dq + self_pair) / problem.scale, beta * k_dread + as_written + self_pair + by_end
        dq.addcmul_(q, along_q.unsqueeze(-1), value=-1).mul_(s.norm_M2C[:, 0].unsqueeze(-1))
        dk.addcmul_(k, along_k.unsqueeze(-1), value=-1).mul_(s.norm_M2C[:, 1].unsqueeze(-1))
    _store(problem, slab, grads, (dq, dk, R.mul_(beta.unsqueeze(-1))))
    return dstates[0]


def _store(problem: _Problem, slab: slice, grads: _Gradients, qkv_grads: tuple[torch.Tensor, ...]) -> None:
    """Write the gradients of q, k and v of a slab, [M, C, D] each, summed over the value heads of a key head."""
    for chunks, dx_MCD in zip(grads.chunks, qkv_grads, strict=True):
        dx_nBCGD = _tokens(problem, dx_MCD)
        shared = dx_nBCGD.shape[3] // chunks.shape[3]
        chunks[slab] = dx_nBCGD if shared == 1 else dx_nBCGD.unflatten(3, (-1, shared)).sum(4)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        reset_BT: torch.Tensor | None,
        qk_l2norm: bool,
        memory: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        problem = _Problem((q, k, v, g, beta), reset_BT, qk_l2norm)
        o, S, saved = _forward(problem, initial_state, v, keep=memory)
        ctx.save_for_backward(q, k, v, g, beta, reset_BT, *saved)
        ctx.qk_l2norm, ctx.memory = qk_l2norm, memory
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return o, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do_BTGV: torch.Tensor, dS_BGKV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, beta, reset_BT, *saved = ctx.saved_tensors
        tensors = (q, k, v, g, beta)
        problem = _Problem(tensors, reset_BT, ctx.qk_l2norm)
        grads = _Gradients(problem, tensors)
        do_chunks = problem.cut.split(do_BTGV)
        dS = dS_BGKV.flatten(0, 1)
        width = len(_Slab._fields)
        for i, slab in reversed(list(enumerate(problem.cut.slabs()))):
            slab_tensors = saved[i * width : (i + 1) * width]
            s = _Slab(*slab_tensors) if ctx.memory == "save" else _absorb(problem, slab, saved[i])
            dS = _differentiate(problem, slab, s, do_chunks, dS, grads)
        dg, dbeta = problem.decays.backward(grads.dlog_nBGC), grads.dbeta_nBGC.transpose(2, 3)
        dg, dbeta = (problem.cut.join(dx).to(x.dtype) for dx, x in ((dg, g), (dbeta, beta)))
        dS_first = None if ctx.state_dtype is None else dS.view(dS_BGKV.shape).to(ctx.state_dtype)
        return *grads.qkv, dg, dbeta, dS_first, None, None, None


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    return v.new_empty(v.shape), v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=dtype)


_operator = as_operator(
    _GatedDeltaRule,
    "chunked_gated_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor? reset, bool qk_l2norm, str memory",
    _fake,
)


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    qk_l2norm: bool,
    memory: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunked form of `sleeptrain.ops.gated_delta_rule`. memory: "save" | "recompute"."""
    tensors = (q_BTHK, k_BTHK, v_BTGV, g_BTG, beta_BTG)
    inputs = [*tensors, initial_state]
    if torch.compiler.is_compiling():
        return _operator(*inputs, reset_BT, qk_l2norm, memory)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _GatedDeltaRule.apply(*inputs, reset_BT, qk_l2norm, memory)
    o, S, _ = _forward(_Problem(tensors, reset_BT, qk_l2norm), initial_state, v_BTGV, keep=None)
    return o, S

"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al., 2024).

A parameter may hold several matrices that only share storage: the fused q|k|v of a projection, or query and gate rows
interleaved by head. For such a parameter `blocks` lists the rows of each matrix, and each matrix is orthogonalised by
itself. Newton-Schulz runs on all matrices of one shape together: a small model then needs only a few large operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

# Quintic coefficients with the steepest slope at zero that keeps singular values near one (Jordan's post on Muon).
QUINTIC = (3.4445, -4.7750, 2.0315)

# One matrix product of this size fills any device, and a longer stack would only cost memory.
MAX_STACK_ELEMENTS = 1 << 26

Rows = slice | torch.Tensor  # the rows (dim 0) of a block: a slice or an int64 index
Blocks = tuple[Rows, ...]
Key = TypeVar("Key")

SCALINGS = ("keller_jordan", "moonshot")


def newton_schulz(G_XMN: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of G: G = U S V' becomes U S' V', S' in about [0.7, 1.2].

    G_XMN: matrices [..., M, N]. Returns the same shape in the dtype of the computation: bf16 on CUDA, fp32 on the CPU
    (many CPUs emulate bf16, tens of times slower), fp64 for fp64. eps: the divisor if the norm of G is smaller.
    """
    tall = G_XMN.shape[-2] > G_XMN.shape[-1]
    X_BMN = G_XMN.mT if tall else G_XMN
    # The norm is computed before the cast: in bf16 it would lose the contribution of small entries.
    wide = torch.promote_types(X_BMN.dtype, torch.float32)
    norm = torch.linalg.matrix_norm(X_BMN, keepdim=True, dtype=wide).clamp(min=eps)
    X_BMN = (X_BMN / norm).to(_compute_dtype(G_XMN)).reshape(-1, *X_BMN.shape[-2:])
    a, b, c = QUINTIC
    for _ in range(steps):
        gram_BMM = X_BMN @ X_BMN.mT
        poly_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        X_BMN = torch.baddbmm(X_BMN, poly_BMM, X_BMN, beta=a)
    return (X_BMN.mT if tall else X_BMN).reshape(G_XMN.shape)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and decoupled weight decay on orthogonalised matrices.

    With m <- lerp(m, g, 1 - momentum) and u = lerp(g, m, momentum), the step is
    W <- (1 - lr * weight_decay) W - lr * scale * newton_schulz(u), for each matrix [rows, cols] of W, where scale is
    sqrt(max(1, rows / cols)) for `keller_jordan` (github KellerJordan/Muon) and 0.2 sqrt(max(rows, cols)), the update
    size of AdamW, for `moonshot` (arXiv 2502.16982, section 2.2).

    params: 2-D floating point parameters, or torch's parameter groups.
    blocks: for a parameter that holds several matrices, the rows of each; together they cover dim 0 once. A parameter
        that is not listed is one matrix.
    Raises ValueError for a parameter that is no matrix, blocks that are no partition, or an unknown scaling.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        scaling: str = "keller_jordan",
        blocks: Mapping[torch.nn.Parameter, Blocks] | None = None,
    ):
        if scaling not in SCALINGS:
            raise ValueError(f"Muon scaling is {scaling!r}; it is one of {', '.join(SCALINGS)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._scaling = scaling
        unused_blocks = dict(blocks or {})
        self._blocks: dict[torch.nn.Parameter, tuple[Rows | None, ...]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2 or not parameter.is_floating_point():
                    raise ValueError(f"Muon takes matrices, not {parameter.dtype} of shape {tuple(parameter.shape)}")
                self._blocks[parameter] = blocks_of_rows(
                    unused_blocks.pop(parameter, None), parameter.shape[0], parameter.device
                )
        if unused_blocks:
            raise ValueError(f"blocks of {len(unused_blocks)} parameters that this optimizer does not hold")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Gradients are not changed."""
        groups = [([p for p in group["params"] if p.grad is not None], group) for group in self.param_groups]
        updates: dict[torch.nn.Parameter, torch.Tensor] = {}
        for parameters, group in groups:
            if parameters:
                updates |= self._momentum_step(parameters, group["momentum"])
        orthogonalise(updates, self._blocks, self._scaling)
        for parameters, group in groups:
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, [updates[p] for p in parameters], alpha=-group["lr"])

    def _momentum_step(
        self, parameters: list[torch.nn.Parameter], beta: float
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Advances the momentum buffers; returns the Nesterov look-ahead of each parameter in new tensors."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - beta)
        return dict(zip(parameters, torch._foreach_lerp(gradients, buffers, beta), strict=True))


def orthogonalise(
    updates: Mapping[Key, torch.Tensor], blocks: Mapping[Key, tuple[Rows | None, ...]], scaling: str
) -> None:
    """Replaces every matrix of the updates by its scaled orthogonalised form, in place.

    updates: [rows, cols] for each key.
    blocks: the rows of each matrix in an update, as `blocks_of_rows` returns them.
    scaling: see `Muon`.
    """
    for stack in _stacks(updates, blocks):
        views = [updates[key] if rows is None else updates[key][rows] for key, rows in stack]
        num_rows, num_cols = views[0].shape
        O_BMN = newton_schulz(torch.stack(views)).to(views[0].dtype)
        O_BMN *= update_scale(num_rows, num_cols, scaling)
        for (key, rows), O_MN in zip(stack, O_BMN, strict=True):
            updates[key][slice(None) if rows is None else rows] = O_MN


def _stacks(
    updates: Mapping[Key, torch.Tensor], blocks: Mapping[Key, tuple[Rows | None, ...]]
) -> Iterator[list[tuple[Key, Rows | None]]]:
    """The matrices of the updates in lists of one shape, dtype and device, in a fixed order."""
    by_shape: dict[tuple[int, int, torch.dtype, torch.device], list[tuple[Key, Rows | None]]] = {}
    for key, update in updates.items():
        for rows in blocks[key]:
            shape = (_num_rows(rows, update.shape[0]), update.shape[1])
            by_shape.setdefault((*shape, update.dtype, update.device), []).append((key, rows))
    for (num_rows, num_cols, *_), matrices in by_shape.items():
        size = max(1, MAX_STACK_ELEMENTS // (num_rows * num_cols))
        yield from (matrices[i : i + size] for i in range(0, len(matrices), size))


def update_scale(num_rows: int, num_cols: int, scaling: str) -> float:
    """The factor on the orthogonalised update of a matrix [num_rows, num_cols]; see `Muon`."""
    if scaling == "keller_jordan":
        return math.sqrt(max(1.0, num_rows / num_cols))
    return 0.2 * math.sqrt(max(num_rows, num_cols))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.is_cuda else torch.float32


def _num_rows(rows: Rows | None, total: int) -> int:
    if rows is None:
        return total
    return len(range(*rows.indices(total))) if isinstance(rows, slice) else rows.numel()


def blocks_of_rows(blocks: Blocks | None, num_rows: int, device: torch.device) -> tuple[Rows | None, ...]:
    """The blocks of `num_rows` rows, with index tensors moved to the device; (None,), all rows, without blocks.

    Raises ValueError unless the blocks hold each row exactly once.
    """
    if blocks is None:
        return (None,)
    all_rows = torch.arange(num_rows)
    indices = [all_rows[rows] if isinstance(rows, slice) else rows.flatten().cpu() for rows in blocks]
    covered = torch.cat([all_rows[:0], *indices])
    if any(i.dtype != torch.int64 for i in indices) or not torch.equal(covered.sort().values, all_rows):
        raise ValueError(f"blocks must hold each of the {num_rows} rows exactly once")
    return tuple(rows if isinstance(rows, slice) else rows.to(device) for rows in blocks)

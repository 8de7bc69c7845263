"""Partial rotary positions (RoFormer, arXiv 2104.09864): only the first dimensions of a head are rotated."""

from __future__ import annotations

import torch


def rope_tables(
    first: int, length: int, head_dim: int, fraction: float, theta: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [length, head_dim * fraction / 2] in at least fp32, for positions first .. first + length - 1."""
    num_rotated = int(head_dim * fraction)
    dtype = torch.promote_types(like.dtype, torch.float32)
    inverse = theta ** (-torch.arange(0, num_rotated, 2, device=like.device, dtype=dtype) / num_rotated)
    positions = torch.arange(first, first + length, device=like.device, dtype=dtype)
    angles = torch.outer(positions, inverse)
    return angles.cos(), angles.sin()


def rotate(x_BTHD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the first dimensions of each head in pairs (i, i + half), in x's dtype.

    tables: [T, half], or [B, T, half] if rows are at different positions.
    """
    cos, sin = (t.unsqueeze(-2) for t in tables)
    half = cos.shape[-1]
    # The backward of a split is one join, that of slices is zeros and sums.
    low, high, rest = x_BTHD.split([half, half, x_BTHD.shape[-1] - 2 * half], dim=-1)
    rotated = low * cos - high * sin, high * cos + low * sin
    return torch.cat([*(t.to(x_BTHD.dtype) for t in rotated), rest], dim=-1)


def rotate_back(x_BTHD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The inverse of `rotate`."""
    cos, sin = tables
    return rotate(x_BTHD, (cos, -sin))

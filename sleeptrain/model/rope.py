"""Partial rotary positions (RoFormer, arXiv 2104.09864): only the first dimensions of a head are rotated."""

from __future__ import annotations

import torch


def rope_tables(
    first: int, length: int, head_dim: int, fraction: float, theta: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [length, head_dim * fraction] in at least fp32, for positions first .. first + length - 1."""
    num_rotated = int(head_dim * fraction)
    dtype = torch.promote_types(like.dtype, torch.float32)
    inverse = theta ** (-torch.arange(0, num_rotated, 2, device=like.device, dtype=dtype) / num_rotated)
    positions = torch.arange(first, first + length, device=like.device, dtype=dtype)
    angles = torch.outer(positions, inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BTHD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the first dimensions of each head in pairs (i, i + half), in x's dtype.

    tables: [T, ...], or [B, T, ...] if rows are at different positions.
    """
    cos, sin = (t.unsqueeze(-2) for t in tables)
    num_rotated = cos.shape[-1]
    x, rest = x_BTHD[..., :num_rotated], x_BTHD[..., num_rotated:]
    low, high = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([rotated.to(x_BTHD.dtype), rest], dim=-1)


def rotate_back(x_BTHD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The inverse of `rotate`."""
    cos, sin = tables
    return rotate(x_BTHD, (cos, -sin))

"""The inverse of a unit lower triangular matrix, numerically stable even if keys repeat."""

from __future__ import annotations

import torch

# Blocks of at most this size are inverted by substitution; larger blocks are merged from two by matrix products.
LARGEST_BLOCK = 8


def base_block(size: int) -> int:
    """The result of halving `size` while it is even and above LARGEST_BLOCK."""
    while size > LARGEST_BLOCK and size % 2 == 0:
        size //= 2
    return size


def unit_lower_inverse(A_MCC: torch.Tensor) -> torch.Tensor:
    """(I + tril(A, -1))^-1 of M contiguous matrices, [M, C, C]; only the strictly lower part of A is read.

    The product (I - A)(I + A^2)(I + A^4)... is shorter. But if keys are similar, as in a window that is read again, its
    factors grow like binomials and cancel in fp32. Substitution and the merge
    [[X, 0], [A21, Y]]^-1 = [[X^-1, 0], [-Y^-1 A21 X^-1, Y^-1]] multiply by true inverses only.
    """
    num_matrices, size, _ = A_MCC.shape
    block = base_block(size)
    T_MCC = A_MCC.new_zeros(A_MCC.shape)
    _diagonal_blocks(T_MCC, block).copy_(_substitute_rows(_diagonal_blocks(A_MCC, block)))
    while block < size:
        A, T = _diagonal_blocks(A_MCC, 2 * block), _diagonal_blocks(T_MCC, 2 * block)
        first = T[..., :block, :block].reshape(-1, block, block)
        second = T[..., block:, block:].reshape(-1, block, block)
        corner = A[..., block:, :block].reshape(-1, block, block)
        merged = torch.bmm(torch.bmm(second, corner), first).neg_()
        T[..., block:, :block] = merged.view(num_matrices, -1, block, block)
        block *= 2
    return T_MCC


def _diagonal_blocks(A_MCC: torch.Tensor, block: int) -> torch.Tensor:
    """A view [M, C/block, block, block] of the blocks on the diagonal."""
    num_matrices, size, _ = A_MCC.shape
    num_blocks = size // block
    blocks = A_MCC.view(num_matrices, num_blocks, block, num_blocks, block).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2)


def _substitute_rows(A_MNbb: torch.Tensor) -> torch.Tensor:
    """Invert small blocks row by row. The blocks are the innermost dimensions, so one step handles all blocks."""
    T_bbMN = A_MNbb.permute(2, 3, 0, 1).neg().contiguous()
    for i in range(len(T_bbMN)):
        T_bbMN[i, i:] = 0
        # T_i = -A_i - sum over 0 < j < i of A_ij T_j; in T_j only the columns left of j are not zero.
        if i > 1:
            T_bbMN[i, : i - 1] += (T_bbMN[i, 1:i, None] * T_bbMN[1:i, : i - 1]).sum(0)
    T_bbMN.diagonal(dim1=0, dim2=1).fill_(1)
    return T_bbMN.permute(2, 3, 0, 1)

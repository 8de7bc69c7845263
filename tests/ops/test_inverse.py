import pytest
import torch

from sleeptrain.ops.inverse import LARGEST_BLOCK, base_block, unit_lower_inverse


def keys_alike(dtype: torch.dtype, size: int = 64) -> torch.Tensor:
    """b k_i . k_j for nearly equal keys and b near 1: the powers of this matrix reach 1e17 before they cancel."""
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(4, 1, 32) + 0.01 * torch.randn(4, size, 32), dim=-1)
    return (0.999 * k @ k.mT).tril(-1).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 10, 20, 24, 25, 32, 64])
def test_it_is_the_inverse_and_reads_the_strictly_lower_part_only(size: int) -> None:
    torch.manual_seed(size)
    A = torch.randn(3, size, size, dtype=torch.float64) / size
    T = unit_lower_inverse(A)
    identity = torch.eye(size, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close((A.tril(-1) + identity) @ T, identity, rtol=0, atol=1e-14)
    assert torch.equal(T, T.tril())


def test_near_equal_keys_lose_no_digits_in_fp32() -> None:
    exact = torch.linalg.inv(keys_alike(torch.float64) + torch.eye(64, dtype=torch.float64))
    found = unit_lower_inverse(keys_alike(torch.float32))
    assert (found - exact).abs().max() < 2e-6 * exact.abs().max()


def test_negative_eigenvalues_with_near_equal_keys() -> None:
    A = 2 * keys_alike(torch.float64)
    exact = torch.linalg.inv(A + torch.eye(64, dtype=torch.float64))
    found = unit_lower_inverse(A.float())
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()


def test_matrices_of_unlike_tokens_stay_apart_exactly() -> None:
    A = torch.randn(1, 64, 64)
    A[:, 37:, :37] = 0
    other = A.clone()
    other[:, :37, :37] += 1
    assert torch.equal(unit_lower_inverse(A)[:, 37:], unit_lower_inverse(other)[:, 37:])


def test_base_block_halves_down_to_a_small_block() -> None:
    assert [base_block(size) for size in (1, 8, 20, 24, 64, 25)] == [1, 8, 5, 6, 8, 25]
    assert LARGEST_BLOCK == 8

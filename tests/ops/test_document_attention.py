"""Attention by the bounds of documents: equal to attention under a mask of all pairs, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sleeptrain.data.batch import PAD
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.document_attention import (
    DocumentBounds,
    after_earlier_keys,
    attend_in_documents,
    bounds_of_fixed_size,
    document_bounds,
    fits_kernel,
    runs_kernel,
)
from tests.ops import varlen_on_cpu  # noqa: F401  (registers the CPU's implementation)

ROWS = [[0] * 5 + [1] * 7, [2] * 12, [PAD] * 3 + [3] + [4] * 4 + [PAD] * 4]
COUNTS = [4, 6, 0]  # earlier keys of each row's first document
EARLIER = 6


def bounds_of(documents: torch.Tensor, earlier: bool) -> DocumentBounds:
    bounds = document_bounds(documents)
    return after_earlier_keys(bounds, torch.tensor(COUNTS), EARLIER) if earlier else bounds


def mask_of(documents: torch.Tensor, earlier: bool, reach: int | None) -> torch.Tensor:
    """[R, 1, L, K]: written anew from the ids of queries and keys; pads see the pads around them."""
    ids = documents.clone()
    ids[2, 8:] = -2  # other pads than those in front
    slots = EARLIER if earlier else 0
    before = torch.full((len(COUNTS), slots), -3)
    for row, count in enumerate(COUNTS):
        if earlier and count:
            before[row, -count:] = ids[row, 0]
    keys = torch.cat([before, ids], dim=1)
    distance = slots + torch.arange(documents.shape[1])[:, None] - torch.arange(keys.shape[1])
    near = (distance >= 0) & (distance < (reach or 1000))
    return ((ids[:, :, None] == keys[:, None, :]) & near)[:, None]


def inputs(head_dim: int, heads: tuple[int, int], earlier: bool, **options: object) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = 12 + (EARLIER if earlier else 0)
    shapes = [(3, 12, heads[0], head_dim), (3, keys, heads[1], head_dim), (3, keys, heads[1], head_dim)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(**options).requires_grad_() for t in tensors]  # type: ignore[call-overload]


def masked(tensors: list[torch.Tensor], mask: torch.Tensor, scale: float | None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in tensors)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def outcome(y: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), tensors)]


CASES = pytest.mark.parametrize("reach", [None, 1, 3, 7])
AFTER = pytest.mark.parametrize("earlier", [False, True])


def test_bounds_of_fixed_size_say_the_same() -> None:
    documents, tensors = torch.tensor(ROWS), inputs(8, (4, 2), earlier=True)
    plain = bounds_of(documents, earlier=True)
    fixed = bounds_of_fixed_size(plain)
    assert len(fixed.queries) == len(fixed.keys) == 9 > len(plain.queries) and fixed.queries[-1] == plain.queries[-1]
    found, expected = (outcome(attend_in_documents(*tensors, b, 3, None), tensors) for b in (fixed, plain))  # type: ignore[arg-type]
    for x, value in zip(found, expected, strict=True):
        assert torch.equal(x, value)


@CASES
@AFTER
@pytest.mark.parametrize(("heads", "scale"), [((4, 4), None), ((4, 2), 0.3)])
def test_it_equals_attention_under_a_mask(
    reach: int | None, earlier: bool, heads: tuple[int, int], scale: float | None
) -> None:
    documents, tensors = torch.tensor(ROWS), inputs(8, heads, earlier)
    y = attend_in_documents(*tensors, bounds_of(documents, earlier), reach, scale)  # type: ignore[arg-type]
    expected = outcome(masked(tensors, mask_of(documents, earlier, reach), scale), tensors)
    for found, value in zip(outcome(y, tensors), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def test_bounds_of_documents_and_pads() -> None:
    bounds = document_bounds(torch.tensor(ROWS))
    assert bounds.queries.tolist() == bounds.keys.tolist() == [0, 5, 12, 24, 27, 28, 32, 36]
    assert bounds.queries.dtype == torch.int32 and bounds.key_index is None and not bounds.whole_rows
    assert bounds.most_queries == bounds.most_keys == 128
    assert document_bounds(torch.zeros(2, 300, dtype=torch.long)).most_queries == 512
    whole = document_bounds(torch.tensor([[0] * 4, [1] * 4]))
    assert whole.whole_rows and whole.queries.tolist() == [0, 4, 8]


def test_bounds_after_earlier_keys() -> None:
    bounds = bounds_of(torch.tensor(ROWS), earlier=True)
    assert bounds.queries.tolist() == [0, 5, 12, 24, 27, 28, 32, 36]
    assert bounds.keys.tolist() == [0, 9, 16, 34, 37, 38, 42, 46]
    assert bounds.key_index is not None and not bounds.whole_rows
    slots = [*range(2, 18), *range(18, 36), *range(36 + 6, 54)]
    assert bounds.key_index.tolist() == slots
    whole = document_bounds(torch.tensor([[0] * 4, [1] * 4]))
    full = after_earlier_keys(whole, torch.tensor([200, 200]), 200)
    assert full.key_index is None and full.keys.tolist() == [0, 204, 408] and full.most_keys == 256


@pytest.mark.parametrize(
    ("element", "head_dim", "fits"), [(2, 64, True), (2, 256, True), (4, 64, False), (2, 36, False), (2, 264, False)]
)
def test_the_kernel_takes_narrow_heads_of_some_widths(element: int, head_dim: int, fits: bool) -> None:
    assert fits_kernel(element, head_dim) is fits


def test_a_gpu_runs_it_in_bf16() -> None:
    x = torch.zeros(1)
    assert not runs_kernel(x, torch.bfloat16, 64)
    with as_on_gpu():
        assert runs_kernel(x, torch.bfloat16, 64) and not runs_kernel(x, torch.float32, 64)
        assert not runs_kernel(x.double(), torch.bfloat16, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@CASES
@AFTER
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernel_equals_attention_under_a_mask(reach: int | None, earlier: bool, head_dim: int) -> None:
    """In bf16 against fp32 on the same numbers; torch's unfused attention is not allowed."""
    documents = torch.tensor(ROWS)
    narrow = inputs(head_dim, (8, 2), earlier, device="cuda", dtype=torch.bfloat16)
    bounds = bounds_of(documents, earlier)
    moved = bounds._replace(
        queries=bounds.queries.cuda(),
        keys=bounds.keys.cuda(),
        key_index=None if bounds.key_index is None else bounds.key_index.cuda(),
    )
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        found = outcome(attend_in_documents(*narrow, moved, reach, None), narrow)  # type: ignore[arg-type]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    with sdpa_kernel(SDPBackend.MATH):
        expected = outcome(masked(wide, mask_of(documents, earlier, reach).cuda(), None), wide)
    for x, value in zip(found, expected, strict=True):
        assert x.isfinite().all()
        error = (x.float() - value).abs().max() / value.abs().max()
        assert error <= 4e-2, f"error {float(error):.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_whole_rows_stay_on_a_fused_kernel(head_dim: int) -> None:
    """The causal call for windows of one document, grouped queries included."""
    tensors = inputs(head_dim, (8, 2), False, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.transpose(1, 2) for t in tensors)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors)

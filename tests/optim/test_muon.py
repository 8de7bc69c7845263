"""Muon against torch's own, against a loop in plain fp64, and block by block."""

import math

import pytest
import torch

from sleeptrain.optim import muon
from sleeptrain.optim.muon import Muon, newton_schulz, update_scale


def parameters(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype) / math.sqrt(s[1])) for s in shapes]


def set_gradients(chosen: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in chosen:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, chosen: list[torch.nn.Parameter], first: int = 0, last: int = 4) -> None:
    for step in range(first, last):
        set_gradients(chosen, step)
        optimizer.step()


def plain_newton_schulz(G: torch.Tensor) -> torch.Tensor:
    """The iteration on singular values: G = U S V' becomes U p(p(...p(S / |G|))) V', where p is the quintic."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    s = S / S.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


def plain_muon(W: torch.Tensor, gradients: list[torch.Tensor], lr: float, wd: float, scale: float) -> torch.Tensor:
    m = torch.zeros_like(W)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        u = 0.05 * g + 0.95 * m
        W = W - lr * wd * W - lr * scale * plain_newton_schulz(u)
    return W


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (2, 3, 8, 5)])
def test_newton_schulz_maps_the_singular_values(shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    O = newton_schulz(G)  # noqa: E741
    expected = torch.stack([plain_newton_schulz(g) for g in G.reshape(-1, *shape[-2:])]).reshape(shape)
    assert O.dtype == torch.float64 and O.shape == G.shape
    torch.testing.assert_close(O, expected, rtol=0, atol=1e-12)
    spread = torch.linalg.svdvals(O)
    assert spread.min() > 0.4 and spread.max() < 1.25


def test_newton_schulz_on_the_cpu_computes_half_precision_in_fp32() -> None:
    G = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(2))
    assert newton_schulz(G).dtype == torch.float32
    half = G.bfloat16()
    assert newton_schulz(half).dtype == torch.float32
    torch.testing.assert_close(newton_schulz(half.double()).float(), newton_schulz(half), rtol=0, atol=2e-2)


def test_newton_schulz_ignores_the_size_of_the_gradient_and_keeps_zero() -> None:
    G = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(newton_schulz(1e-5 * G), newton_schulz(G), rtol=0, atol=1e-12)
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("scaling", ["keller_jordan", "moonshot"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 5)])
def test_equals_a_plain_fp64_loop(shape: tuple[int, int], scaling: str) -> None:
    (p,) = parameters(shape)
    start, gradients = p.detach().clone(), []
    for step in range(4):
        set_gradients([p], step)
        assert p.grad is not None
        gradients.append(p.grad)
    rows, cols = shape
    scale = math.sqrt(max(1, rows / cols)) if scaling == "keller_jordan" else 0.2 * math.sqrt(max(rows, cols))
    run(Muon([p], lr=0.03, weight_decay=0.1, scaling=scaling), [p])
    torch.testing.assert_close(p.detach(), plain_muon(start, gradients, 0.03, 0.1, scale), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("scaling", "torch_name"), [("keller_jordan", "original"), ("moonshot", "match_rms_adamw")])
def test_equals_torch_muon_to_the_rounding_of_its_bf16(scaling: str, torch_name: str) -> None:
    shapes = [(16, 16), (8, 24), (24, 8), (16, 16)]
    ours, theirs = parameters(*shapes, dtype=torch.float32), parameters(*shapes, dtype=torch.float32)
    run(Muon(ours, lr=0.01, weight_decay=0.1, scaling=scaling), ours)
    run(torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn=torch_name), theirs)
    for mine, other, start in zip(ours, theirs, parameters(*shapes, dtype=torch.float32), strict=True):
        moved = (other - start).detach()
        assert float((mine - other).detach().norm() / moved.norm()) < 0.02


@pytest.mark.parametrize("scaling", ["keller_jordan", "moonshot"])
def test_blocks_are_matrices_of_their_own(scaling: str) -> None:
    """A fused q|k|v and a projection with query and gate rows interleaved by head, against their parts."""
    qkv, gated = parameters((24, 10), (16, 10))
    heads = torch.arange(16).view(2, 2, 4)  # head, query or gate, channel
    cuts = {qkv: (slice(0, 6), slice(6, 12), slice(12, 24)), gated: (heads[:, 0].flatten(), heads[:, 1].flatten())}
    parts = [(p, rows, torch.nn.Parameter(p.detach()[rows].clone())) for p, blocks in cuts.items() for rows in blocks]
    fused = Muon([qkv, gated], weight_decay=0.1, scaling=scaling, blocks=cuts)
    separate = Muon([part for *_, part in parts], weight_decay=0.1, scaling=scaling)
    for step in range(3):
        set_gradients([qkv, gated], step)
        for matrix, rows, part in parts:
            assert matrix.grad is not None
            part.grad = matrix.grad[rows].clone()
        fused.step()
        separate.step()
    for matrix, rows, part in parts:
        torch.testing.assert_close(matrix.detach()[rows], part.detach(), rtol=0, atol=1e-15)


def test_one_newton_schulz_call_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda G: seen.append(tuple(G.shape)) or newton_schulz(G))
    a, b, c, d = parameters((4, 6), (8, 6), (8, 6), (4, 6))
    groups = [{"params": [a, b, c], "weight_decay": 0.1}, {"params": [d], "weight_decay": 0.0}]
    run(Muon(groups, blocks={b: (slice(0, 4), slice(4, 8))}), [a, b, c, d], last=1)
    assert sorted(seen) == [(1, 8, 6), (4, 4, 6)]


def test_stacks_are_cut_where_they_would_cost_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked, cut = parameters(*[(4, 6)] * 5), parameters(*[(4, 6)] * 5)
    run(Muon(stacked), stacked)
    monkeypatch.setattr(muon, "MAX_STACK_ELEMENTS", 2 * 4 * 6)
    run(Muon(cut), cut)
    for a, b in zip(stacked, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_weight_decay_by_group_and_untouched_without_gradient() -> None:
    a, b, frozen = parameters((4, 4), (4, 4), (4, 4))
    before = frozen.detach().clone()
    optimizer = Muon([{"params": [a], "weight_decay": 0.5}, {"params": [b, frozen], "weight_decay": 0.0}], lr=0.1)
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    start_a, start_b = a.detach().clone(), b.detach().clone()
    optimizer.step()
    torch.testing.assert_close(a.detach(), start_a * (1 - 0.1 * 0.5), rtol=0, atol=1e-16)
    assert torch.equal(b, start_b) and torch.equal(frozen, before)
    assert frozen not in optimizer.state


def test_gradients_are_not_changed() -> None:
    (p,) = parameters((5, 3))
    set_gradients([p], 0)
    assert p.grad is not None
    kept = p.grad.clone()
    Muon([p]).step()
    assert torch.equal(p.grad, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_goes_around_exactly(dtype: torch.dtype) -> None:
    straight, broken = parameters((8, 6), (6, 8), dtype=dtype), parameters((8, 6), (6, 8), dtype=dtype)
    run(Muon(straight), straight, last=6)
    first = Muon(broken)
    run(first, broken, last=3)
    second = Muon(broken)
    second.load_state_dict(first.state_dict())
    run(second, broken, first=3, last=6)
    assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))


@pytest.mark.parametrize(
    "blocks",
    [
        (slice(0, 3), slice(4, 6)),  # a missing row
        (slice(0, 4), slice(3, 6)),  # a row twice
        (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 6])),  # beyond the end
        (torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.bool),),
        (),
    ],
)
def test_blocks_that_are_no_partition_are_refused(blocks: muon.Blocks) -> None:
    (p,) = parameters((6, 4))
    with pytest.raises(ValueError, match="6 rows"):
        Muon([p], blocks={p: blocks})


def test_other_misuse_is_refused() -> None:
    (p,) = parameters((6, 4))
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="keller_jordan"):
        Muon([p], scaling="keller")
    with pytest.raises(ValueError, match="does not hold"):
        Muon([p], blocks={parameters((6, 4))[0]: (slice(0, 6),)})


def test_scales() -> None:
    assert update_scale(12, 3, "keller_jordan") == 2.0
    assert update_scale(3, 12, "keller_jordan") == 1.0
    assert update_scale(3, 25, "moonshot") == update_scale(25, 3, "moonshot") == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_in_bf16() -> None:
    G = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(4))
    O = newton_schulz(G.cuda())  # noqa: E741
    assert O.dtype == torch.bfloat16
    torch.testing.assert_close(O.float().cpu(), newton_schulz(G), rtol=0, atol=0.05)
    assert newton_schulz(G.double().cuda()).dtype == torch.float64

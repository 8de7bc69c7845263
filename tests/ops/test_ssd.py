from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.ops import chunks, ssd
from tests.ops.cases import leaves, outcome, resets, ssd_inputs, worst


def run(implementation: str, **options: Any):
    return lambda C, B, x, dt, A, S=None: ssd(C, B, x, dt, A, initial_state=S, implementation=implementation, **options)


CASES = [  # B, T, groups, H, K, V
    (2, 37, 1, 4, 8, 6),
    (3, 150, 2, 4, 16, 96),
    (2, 20, 2, 2, 32, 16),
    (1, 200, 1, 2, 96, 8),
    (2, 1, 1, 1, 8, 8),
]


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop(case: tuple[int, ...], with_resets: bool, memory: str) -> None:
    reset = resets(*case[:2]) if with_resets else None
    tensors = ssd_inputs(*case)
    expected = outcome(run("reference", reset_BT=reset), tensors)
    assert worst(outcome(run("chunked", reset_BT=reset, memory=memory), tensors), expected) < 1e-12


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_the_cut_into_slabs_changes_nothing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ssd_inputs(2, 300, 1, 2, 16, 8)
    expected = outcome(run("chunked", reset_BT=resets(2, 300), memory=memory), tensors)
    monkeypatch.setattr(chunks, "SLAB_ELEMENTS", 1)
    assert worst(outcome(run("chunked", reset_BT=resets(2, 300), memory=memory), tensors), expected) < 1e-13


def test_gradcheck() -> None:
    reset = torch.tensor([[False, False, True, False, True]])
    tensors = ssd_inputs(1, 5, 1, 2, 3, 2)
    assert torch.autograd.gradcheck(run("chunked"), tensors)
    assert torch.autograd.gradcheck(run("chunked", reset_BT=reset), tensors)


def test_no_initial_state_is_a_zero_one() -> None:
    *tensors, _ = ssd_inputs(2, 80, 1, 2, 8, 8)
    assert worst(outcome(run("chunked"), tensors), outcome(run("reference"), tensors)) < 1e-12


def test_two_halves_with_the_carried_state_equal_one_call() -> None:
    tensors = ssd_inputs(2, 150, 1, 2, 16, 8)
    expected = outcome(run("chunked"), tensors)

    def halves(*inputs: torch.Tensor):
        first, second = [x[:, :67] for x in inputs[:4]], [x[:, 67:] for x in inputs[:4]]
        y_1, S = run("chunked")(*first, *inputs[4:])
        y_2, S = run("chunked")(*second, inputs[4], S)
        return torch.cat([y_1, y_2], dim=1), S

    assert worst(outcome(halves, tensors), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_crosses_a_reset(dtype: torch.dtype) -> None:
    T, at = 150, 90
    tensors = ssd_inputs(2, T, 1, 2, 16, 8, dtype=dtype)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, at] = True
    y, S = run("chunked", reset_BT=reset)(*tensors)
    grads = torch.autograd.grad([y[:, at:].square().sum() + S.square().sum()], tensors)
    for grad in grads[:4]:
        assert not grad[:, :at].any() and grad[:, at:].any()
    assert not grads[5].any()

    others = leaves(tensors)
    with torch.no_grad():
        for x in others[:4]:
            x[:, :at] *= 7
        others[5].neg_()
    y_other, S_other = run("chunked", reset_BT=reset)(*others)
    assert torch.equal(y[:, at:], y_other[:, at:]) and torch.equal(S, S_other)


def test_strong_decays_across_a_reset_do_not_overflow() -> None:
    C, B, x, dt, A, S = ssd_inputs(1, 150, 1, 2, 8, 8, dtype=torch.float32)
    strong = leaves([C, B, x, dt, A * 20, S])
    reset = resets(2, 150)[:1]
    expected = outcome(run("reference", reset_BT=reset), leaves(strong, torch.float64))
    found = outcome(run("chunked", reset_BT=reset), strong)
    assert all(x.isfinite().all() for x in found)
    # The gradient of A vanishes with the decays; in fp32 only rounding remains.
    assert worst(found[:6] + found[7:], expected[:6] + expected[7:]) < 1e-5


def test_the_decays_gradient_keeps_its_digits_where_decays_are_strong() -> None:
    C, B, x, dt, A, S = ssd_inputs(2, 70, 1, 2, 16, 16)
    strong = leaves([C, B, x, dt + 0.5, A - 3, S], torch.float32)
    expected = outcome(run("reference"), leaves(strong, torch.float64))
    assert worst(outcome(run("chunked"), strong)[6:7], expected[6:7]) < 1e-4


def test_pads_are_inert() -> None:
    tensors = ssd_inputs(2, 100, 1, 2, 8, 8, dtype=torch.float32)
    pad = torch.rand(2, 100, generator=torch.Generator().manual_seed(3)) < 0.4
    pad[1] = True
    with torch.no_grad():
        tensors[3].masked_fill_(pad.unsqueeze(-1), 0)
    others = leaves(tensors)
    with torch.no_grad():
        for x in others[:3]:
            x[pad] *= 5
    (y, S), (y_other, S_other) = (run("chunked")(*x) for x in (tensors, others))
    assert torch.equal(y[~pad], y_other[~pad]) and torch.equal(S, S_other)
    assert torch.equal(S[1], tensors[5][1])


def test_bf16_inputs_are_computed_in_fp32() -> None:
    wide = ssd_inputs(2, 70, 1, 2, 16, 16, dtype=torch.float32)
    mixed = [x.detach().bfloat16().requires_grad_() for x in wide[:3]] + leaves(wide[3:])
    found = outcome(run("chunked"), mixed)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3 + [torch.float32] * 3
    exact = leaves(mixed, torch.float64)
    y, S = run("reference")(*exact)
    assert worst(found[:1], [y]) < 5e-3 and worst(found[1:2], [S]) < 1e-5
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype).double() for x in found[:2]]
    expected = torch.autograd.grad([y, S], exact, cotangents)
    assert worst(found[2:5], expected[:3]) < 5e-3 and worst(found[5:], expected[3:]) < 1e-4


def test_equals_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    theirs = getattr(mamba2.mamba2_chunk_scan, "__wrapped__", mamba2.mamba2_chunk_scan)
    tensors = ssd_inputs(2, 150, 2, 4, 32, 16, dtype=torch.float32)

    def scan(C, B, x, dt, A, S):
        y, last = theirs(x, dt, A, B, C, 64, initial_states=S.mT, return_final_states=True)
        return y, last.mT

    assert worst(outcome(run("chunked"), tensors), outcome(scan, tensors)) < 1e-4

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops import chunks, gated_delta_rule
from tests.ops.cases import delta_inputs, leaves, outcome, resets, worst


def run(implementation: str, **options: Any):
    return lambda q, k, v, g, beta, S=None: gated_delta_rule(
        q, k, v, g, beta, initial_state=S, implementation=implementation, **options
    )


CASES = [  # B, T, H, G, K, V
    (2, 37, 2, 2, 8, 6),
    (3, 100, 1, 3, 16, 96),
    (2, 20, 2, 4, 32, 16),
    (1, 130, 2, 2, 96, 8),
    (2, 1, 1, 1, 8, 8),
    (1, 5, 2, 2, 160, 16),
]


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("options", ["plain", "l2norm", "resets", "both"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop(case: tuple[int, ...], options: str, memory: str) -> None:
    arguments = {"qk_l2norm": options in ("l2norm", "both")}
    reset = resets(*case[:2]) if options in ("resets", "both") else None
    tensors = delta_inputs(*case)
    expected = outcome(run("reference", reset_BT=reset, **arguments), tensors)
    found = outcome(run("chunked", reset_BT=reset, memory=memory, **arguments), tensors)
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_the_cut_into_slabs_changes_nothing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = delta_inputs(2, 150, 1, 2, 16, 8)
    expected = outcome(run("chunked", reset_BT=resets(2, 150), memory=memory), tensors)
    monkeypatch.setattr(chunks, "SLAB_ELEMENTS", 1)
    assert worst(outcome(run("chunked", reset_BT=resets(2, 150), memory=memory), tensors), expected) < 1e-13


def test_gradients_of_the_output_alone_and_of_the_state_alone() -> None:
    tensors = delta_inputs(2, 37, 1, 2, 8, 6)
    for i in (0, 1):
        expected = torch.autograd.grad(run("reference")(*tensors)[i].square().sum(), tensors, allow_unused=True)
        found = torch.autograd.grad(run("chunked")(*tensors)[i].square().sum(), tensors)
        exact = [torch.zeros_like(x) if e is None else e for x, e in zip(tensors, expected, strict=True)]
        assert worst(found, exact) < 1e-12


def test_gradcheck() -> None:
    tensors = delta_inputs(1, 5, 1, 2, 3, 2)
    assert torch.autograd.gradcheck(run("chunked", qk_l2norm=True), tensors)
    reset = torch.tensor([[False, False, True, False, True]])
    assert torch.autograd.gradcheck(run("chunked", reset_BT=reset), tensors)


def test_no_initial_state_is_a_zero_one() -> None:
    *tensors, S = delta_inputs(2, 40, 2, 2, 8, 8)
    with torch.no_grad():
        for a, b in zip(run("chunked")(*tensors), run("chunked")(*tensors, torch.zeros_like(S)), strict=True):
            assert torch.equal(a, b)
    expected = outcome(run("reference"), tensors)
    assert worst(outcome(run("chunked"), tensors), expected) < 1e-12


def test_two_halves_with_the_carried_state_equal_one_call() -> None:
    tensors = delta_inputs(2, 90, 2, 2, 16, 8)
    expected = outcome(run("chunked"), tensors)

    def halves(*inputs: torch.Tensor):
        first, second = [x[:, :41] for x in inputs[:5]], [x[:, 41:] for x in inputs[:5]]
        o_1, S = run("chunked")(*first, inputs[5])
        o_2, S = run("chunked")(*second, S)
        return torch.cat([o_1, o_2], dim=1), S

    assert worst(outcome(halves, tensors), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_crosses_a_reset(dtype: torch.dtype) -> None:
    T, at = 90, 53
    tensors = delta_inputs(2, T, 1, 2, 16, 8, dtype=dtype)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, at] = True
    o, S = run("chunked", reset_BT=reset)(*tensors)
    grads = torch.autograd.grad([o[:, at:].square().sum() + S.square().sum()], tensors)
    for grad in grads[:5]:
        assert not grad[:, :at].any()
        assert grad[:, at + 1 :].any()
    assert not grads[5].any()
    assert not grads[3][:, at].any()  # the decay of the first token meets a zero state

    others = leaves(tensors)
    with torch.no_grad():
        for x in others[:5]:
            x[:, :at] *= 7
        others[3][:, at] *= 3
        others[5].neg_()
    o_other, S_other = run("chunked", reset_BT=reset)(*others)
    assert torch.equal(o[:, at:], o_other[:, at:]) and torch.equal(S, S_other)
    grads_other = torch.autograd.grad([o_other[:, at:].square().sum() + S_other.square().sum()], others)
    for a, b in zip(grads[:5], grads_other[:5], strict=True):
        assert torch.equal(a[:, at:], b[:, at:])


def test_strong_decays_across_a_reset_do_not_overflow() -> None:
    q, k, v, g, beta, S = delta_inputs(1, 60, 1, 1, 8, 8, dtype=torch.float32)
    strong = leaves([q, k, v, g * 400, beta, S])
    reset = resets(2, 60)[:1]
    expected = outcome(run("reference", reset_BT=reset), leaves(strong, torch.float64))
    assert worst(outcome(run("chunked", reset_BT=reset), strong), expected) < 1e-4


def test_the_decays_gradient_keeps_its_digits_where_decays_are_strong() -> None:
    """It is tiny compared with the term of a token with itself, which must not enter it."""
    q, k, v, g, beta, S = delta_inputs(2, 70, 1, 1, 32, 32)
    strong = leaves([q, k, v, g - 3, beta, S], torch.float32)
    expected = outcome(run("reference"), leaves(strong, torch.float64))
    assert worst(outcome(run("chunked"), strong)[5:6], expected[5:6]) < 5e-7


def test_pads_are_inert() -> None:
    tensors = delta_inputs(2, 45, 1, 1, 8, 8, dtype=torch.float32)
    pad = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) < 0.4
    pad[1] = True
    with torch.no_grad():
        for x in tensors[3:5]:
            x.masked_fill_(pad.unsqueeze(-1), 0)
    others = leaves(tensors)
    with torch.no_grad():
        for x in others[:3]:
            x[pad] *= 5
    (o, S), (o_other, S_other) = (run("chunked")(*x) for x in (tensors, others))
    assert torch.equal(o[~pad], o_other[~pad]) and torch.equal(S, S_other)
    assert torch.equal(S[1], tensors[5][1])
    dk, dv = torch.autograd.grad(o[~pad].square().sum() + S.square().sum(), tensors[1:3])
    assert not dk[pad].any() and not dv[pad].any()


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_repeated_keys_in_fp32(spread: float) -> None:
    """A window that is read again has the same keys again; beta is near 1."""
    q, k, v, g, beta, S = delta_inputs(2, 128, 1, 1, 32, 32)
    alike = F.normalize(k[:, :1] + spread * k, dim=-1)
    exact = leaves([q, alike, v, g * 1e-3, 1 - 1e-3 * beta, S])
    expected = outcome(run("reference"), exact)
    found = outcome(run("chunked"), leaves(exact, torch.float32))
    assert worst(found, expected) < 1e-4


def test_bf16_inputs_are_computed_in_fp32() -> None:
    wide = delta_inputs(2, 70, 1, 2, 16, 16, dtype=torch.float32)
    mixed = [x.detach().bfloat16().requires_grad_() for x in wide[:3]] + leaves(wide[3:])
    exact = leaves(mixed, torch.float64)
    found = outcome(run("chunked", qk_l2norm=True), mixed)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3 + [torch.float32] * 3
    o, S = run("reference", qk_l2norm=True)(*exact)
    assert worst(found[:1], [o]) < 5e-3 and worst(found[1:2], [S]) < 1e-5
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype).double() for x in found[:2]]
    expected = torch.autograd.grad([o, S], exact, cotangents)
    assert worst(found[2:5], expected[:3]) < 5e-3 and worst(found[5:], expected[3:]) < 1e-5


def test_equals_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    theirs = getattr(qwen.torch_chunk_gated_delta_rule, "__wrapped__", qwen.torch_chunk_gated_delta_rule)
    tensors = delta_inputs(2, 150, 2, 4, 32, 16, dtype=torch.float32)
    expected = outcome(
        lambda *x: theirs(*x[:5], initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=True), tensors
    )
    assert worst(outcome(run("chunked", qk_l2norm=True), tensors), expected) < 1e-5


def test_recompute_keeps_less() -> None:
    def kept(memory: str) -> int:
        storages: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            tensors = delta_inputs(2, 256, 2, 2, 32, 32, dtype=torch.float32)
            outputs = run("chunked", memory=memory)(*tensors)
        assert outputs[0].grad_fn is not None
        return sum(storages.values())

    assert 2 * kept("recompute") < kept("save")

from __future__ import annotations

import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.ops import fla, gated_delta_rule, ssd
from tests.ops.cases import delta_inputs, leaves, outcome, resets, ssd_inputs, worst


def per_sequence(kernel_of_one: Any):
    """A kernel with the interface of flash-linear-attention, from one that knows neither documents nor rows."""

    def kernel(*tensors, initial_state, output_final_state, cu_seqlens=None, **options):
        assert output_final_state
        if cu_seqlens is None:
            return kernel_of_one(*tensors, initial_state)
        bounds = cu_seqlens.tolist()
        done = [
            kernel_of_one(*(x[:, a:b] for x in tensors), None if initial_state is None else initial_state[i : i + 1])
            for i, (a, b) in enumerate(pairwise(bounds))
        ]
        return torch.cat([o for o, _ in done], dim=1), torch.cat([S for _, S in done])

    return kernel


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
def test_rows_cut_at_resets_equal_the_token_loop(with_resets: bool, with_state: bool) -> None:
    tensors = delta_inputs(3, 23, 1, 2, 4, 4, dtype=torch.float32)[: 6 if with_state else 5]
    reset = resets(3, 23) if with_resets else None
    kernel = per_sequence(
        lambda q, k, v, g, beta, S: gated_delta_rule(q, k, v, g, beta, initial_state=S, implementation="reference")
    )

    def cut(*inputs: torch.Tensor):
        return fla.run_kernel(kernel, inputs[:5], inputs[5] if with_state else None, reset)

    def loop(*inputs: torch.Tensor):
        S = inputs[5] if with_state else None
        return gated_delta_rule(*inputs[:5], initial_state=S, reset_BT=reset, implementation="reference")

    assert worst(outcome(cut, tensors), outcome(loop, tensors)) < 1e-5


def test_ssd_is_gated_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q, k, v, g, S):
        outputs = []
        for t in range(q.shape[1]):
            S = S * g[:, t, :, None, None].exp() + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return torch.stack(outputs, dim=1), S

    monkeypatch.setattr(fla, "_kernel", lambda module, name: per_sequence(attention))
    tensors, reset = ssd_inputs(2, 9, 2, 4, 3, 5, dtype=torch.float32), resets(2, 9)
    found = outcome(lambda *x: fla.ssd(*x[:5], initial_state=x[5], reset_BT=reset), tensors)
    expected = outcome(lambda *x: ssd(*x[:5], initial_state=x[5], reset_BT=reset, implementation="reference"), tensors)
    assert worst(found, expected) < 1e-5


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")

    monkeypatch.setattr(fla.importlib, "import_module", refuse)
    with pytest.raises(ConfigError, match=r"sleeptrain\[gpu\]"):
        fla._kernel("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")


@pytest.mark.parametrize(("value", "kept"), [(None, "0"), ("1", "1")])
def test_replacements_of_the_kernels_are_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str | None, kept: str
) -> None:
    monkeypatch.setattr(fla.importlib, "import_module", lambda name: SimpleNamespace(kernel=None))
    for switch in fla.REPLACEMENTS:
        monkeypatch.setenv(switch, value or "")
        if value is None:
            monkeypatch.delenv(switch)
    fla._kernel("fla.ops", "kernel")
    assert [os.environ[switch] for switch in fla.REPLACEMENTS] == [kept, kept]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("with_resets", [False, True])
def test_delta_rule_kernels_equal_the_token_loop(with_resets: bool) -> None:
    tensors = [x.detach().cuda().requires_grad_() for x in delta_inputs(2, 150, 2, 4, 64, 64, dtype=torch.float32)]
    reset = resets(2, 150).cuda() if with_resets else None

    def run(implementation: str):
        return lambda *x: gated_delta_rule(
            *x[:5], initial_state=x[5], reset_BT=reset, qk_l2norm=True, implementation=implementation
        )

    expected = outcome(run("reference"), leaves(tensors, torch.float64))
    assert worst(outcome(run("fla"), tensors), expected) < 1e-2  # TF32 products


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("with_resets", [False, True])
def test_ssd_kernels_equal_the_token_loop(with_resets: bool) -> None:
    tensors = [x.detach().cuda().requires_grad_() for x in ssd_inputs(2, 150, 1, 4, 64, 64, dtype=torch.float32)]
    reset = resets(2, 150).cuda() if with_resets else None

    def run(implementation: str):
        return lambda *x: ssd(*x[:5], initial_state=x[5], reset_BT=reset, implementation=implementation)

    expected = outcome(run("reference"), leaves(tensors, torch.float64))
    assert worst(outcome(run("fla"), tensors), expected) < 1e-2  # TF32 products
